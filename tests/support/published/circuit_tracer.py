"""circuit-tracer's single-layer transcoders: ``layer_N.safetensors`` and ``config.yaml``."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from . import Builder, Published

D_MODEL, D_SAE, K = 20, 48, 15
CONFIG: dict[str, Any] = {
    "model_name": "Qwen/Qwen3-4B",
    "model_kind": "transcoder_set",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "mlp.hook_out",
}


def _tensors(seed: int) -> dict[str, Tensor]:
    """Float32, both matrices feature by feature; decoder rows of very different norms, most features below 0."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(D_SAE, 1, generator=g) * 3 + 0.2
    return {
        "W_enc": torch.randn(D_SAE, D_MODEL, generator=g) / sqrt(D_MODEL),
        "W_dec": torch.randn(D_SAE, D_MODEL, generator=g) * rows,
        "b_enc": torch.randn(D_SAE, generator=g) * 0.3 - 0.8,
        "b_dec": torch.randn(D_MODEL, generator=g),
    }


def _published(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any] | None,
    *,
    turned: bool = False,
    choices: dict[str, Any] | None = None,
    topk: bool = False,
) -> Published:
    weights = folder / "layer_3.safetensors"
    turn = {"W_dec": tensors["W_dec"].T.contiguous()} if turned else {}
    save_file(tensors | turn, weights)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    threshold = wide.get("activation_function.threshold", torch.zeros(D_SAE, dtype=torch.float64))

    def encode(x: Tensor) -> Tensor:
        pre = x @ wide["W_enc"].T + wide["b_enc"]
        if not topk:
            return pre * (pre > threshold)
        gate = torch.zeros_like(pre).scatter_(-1, pre.topk(K, dim=-1).indices, 1.0)
        return pre * gate

    def reconstruct(x: Tensor) -> Tensor:
        out = encode(x) @ wide["W_dec"] + wide["b_dec"]
        return out + x @ wide["W_skip"].T if "W_skip" in wide else out

    return Published(
        path=folder,
        weights=weights,
        config=None if config is None else folder / "config.yaml",
        d_in=D_MODEL,
        encode=encode,
        reconstruct=reconstruct,
        optional=frozenset({"activation_function.threshold", "W_skip"}),
        choices=choices or {},
    )


def _extra(seed: int, *, skip: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed + 1)
    threshold = {"activation_function.threshold": torch.rand(D_SAE, generator=g) * 0.5}
    return threshold | ({"W_skip": torch.randn(D_MODEL, D_MODEL, generator=g)} if skip else {})


def relu(folder: Path, seed: int) -> Published:
    """A ReLU transcoder with its set's settings."""
    return _published(folder, _tensors(seed), CONFIG | {"feature_output_hook": "hook_mlp_out", "activation": "relu"})


def turned(folder: Path, seed: int) -> Published:
    """A ReLU transcoder as files were before August 2025: ``W_dec`` [d_out, d_sae]."""
    return _published(folder, _tensors(seed), CONFIG | {"feature_input_hook": "hook_resid_mid"}, turned=True)


def jumprelu_skip(folder: Path, seed: int) -> Published:
    """A JumpReLU transcoder with skip connection, and nothing beside it."""
    return _published(folder, _tensors(seed) | _extra(seed), None)


def topk(folder: Path, seed: int) -> Published:
    """A TopK transcoder: negative values among the k largest stay."""
    return _published(folder, _tensors(seed), CONFIG | {"activation": "topk", "k": K}, topk=True)


def topk_of_unknown_k(folder: Path, seed: int) -> Published:
    """A TopK transcoder whose settings lack k."""
    return _published(folder, _tensors(seed), CONFIG | {"activation": "topk"}, choices={"k": K}, topk=True)


BUILDERS: dict[str, Builder] = {
    "circuit_tracer_relu": relu,
    "circuit_tracer_turned": turned,
    "circuit_tracer_jumprelu_skip": jumprelu_skip,
    "circuit_tracer_topk": topk,
    "circuit_tracer_topk_of_unknown_k": topk_of_unknown_k,
}
