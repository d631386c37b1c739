"""Random SAEs in memory: at least one of every kind that SAELens can represent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from saeguard_sae.coders import MatchingPursuit, SparseCoder, Temporal
from saeguard_sae.dictionary import AbsTopK, ActivationFunction, Dictionary, Gated, JumpReLU, ReLU, TopK

D_IN, D_OUT, D_SAE = 20, 24, 48

Maker: TypeAlias = Callable[[int], SparseCoder]
"""A random SAE from a seed."""


def _normals(seed: int) -> Callable[..., Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, by: float = 0.3) -> Tensor:
        return torch.randn(*shape, generator=g) * by

    return normal


_ACTIVATIONS: dict[str, Callable[[Callable[..., Tensor]], ActivationFunction]] = {
    "relu": lambda normal: ReLU(),
    "jumprelu": lambda normal: JumpReLU(normal(D_SAE).abs()),
    "gated": lambda normal: Gated(normal(D_SAE), normal(D_SAE), normal(D_SAE)),
    "topk": lambda normal: TopK(6),
    "abstopk": lambda normal: AbsTopK(6),
}


def dictionary(seed: int, activation: str = "relu", *, skip: bool = False, **own: Any) -> Dictionary:
    """An SAE, or a transcoder into ``D_OUT`` where ``own`` says so."""
    normal = _normals(seed)
    d_out = D_OUT if own.get("is_transcoder", False) else D_IN
    return Dictionary(
        W_enc=normal(D_IN, D_SAE),
        b_enc=normal(D_SAE, by=0.0 if activation == "gated" else 0.3),
        W_dec=normal(D_SAE, d_out),
        b_dec=normal(d_out),
        activation=_ACTIVATIONS[activation](normal),
        W_skip=normal(d_out, D_IN) if skip else None,
        **own,
    )


def _pursuit(seed: int, **own: Any) -> MatchingPursuit:
    normal = _normals(seed)
    W_dec = torch.nn.functional.normalize(normal(D_SAE, D_IN), dim=1)
    return MatchingPursuit(W_dec, normal(D_IN), **own)


def _temporal(seed: int, *, tied: bool, layers: int, biases: bool, **own: Any) -> Temporal:
    normal = _normals(seed)
    W_dec = normal(D_SAE, D_IN)
    rows = {"k_ctx": 8, "q_target": 8, "v_ctx": D_SAE, "c_proj": D_SAE}

    def layer() -> dict[str, Tensor]:
        weights = {f"{name}.weight": normal(size, D_SAE) for name, size in rows.items()}
        return weights | ({f"{name}.bias": normal(size) for name, size in rows.items()} if biases else {})

    W_enc = W_dec.T if tied else normal(D_IN, D_SAE)
    attention = tuple(layer() for _ in range(layers))
    return Temporal(W_enc, W_dec, normal(D_IN), attention, n_heads=2, tied=tied, **own)


_TRANSCODER = partial(dictionary, centre=False, is_transcoder=True)

SAVEABLE: dict[str, Maker] = {
    **{name: partial(dictionary, activation=name) for name in _ACTIVATIONS},
    "relu_layer_norm": partial(dictionary, normalisation="layer_norm"),
    "jumprelu_constant_norm": partial(
        dictionary, activation="jumprelu", normalisation="constant_norm_rescale", centre=False
    ),
    "topk_layer_norm": partial(dictionary, activation="topk", normalisation="layer_norm"),
    "transcoder": _TRANSCODER,
    "jumprelu_transcoder": partial(_TRANSCODER, activation="jumprelu", normalisation="constant_norm_rescale"),
    "skip_transcoder": partial(_TRANSCODER, skip=True, normalisation="layer_norm"),
    "jumprelu_skip_transcoder": partial(_TRANSCODER, activation="jumprelu", skip=True),
    "pursuit": partial(_pursuit, max_iterations=D_IN, residual_threshold=0.5),
    "pursuit_rounds": partial(_pursuit, max_iterations=7, stop_on_duplicate_support=False, centre=False),
    "pursuit_layer_norm": partial(_pursuit, max_iterations=9, normalisation="layer_norm"),
    "temporal": partial(_temporal, tied=True, layers=1, biases=True, k=6),
    "temporal_untied": partial(_temporal, tied=False, layers=2, biases=False, k=None, centre=False, scale=0.4),
}
