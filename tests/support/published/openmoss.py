"""OpenMOSS' SAEs of 2025 and later: R1-Distill's linear layers, then ``W_E`` and ``W_D``."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.published import Builder, Published

D, F, NORM_IN, NORM_OUT = 20, 48, 5.8125, 2.40625


def _settings(**changes: Any) -> dict[str, Any]:
    return {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": F / D,
        "use_decoder_bias": True,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 6,
        "use_triton_kernel": False,
        "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "jumprelu_threshold_window": 2.0,
        "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
        "use_glu_encoder": False,
    } | changes


class _Drawn:
    """Weights as they are trained: W [F, D], b [F], V [F, D], c [D], and a threshold for each feature."""

    def __init__(self, seed: int) -> None:
        dice = torch.Generator().manual_seed(seed)
        self.W = torch.randn(F, D, generator=dice) * 0.3
        self.b = torch.randn(F, generator=dice) * 0.3 - 0.3
        V = torch.randn(F, D, generator=dice)
        self.V = V / V.norm(dim=1, keepdim=True) * (0.3 + 2.2 * torch.rand(F, 1, generator=dice))
        self.c = torch.randn(D, generator=dice) * 0.4
        self.log_threshold = (0.3 + torch.rand(F, generator=dice)).log()


def _write(path: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Path, Path]:
    if settings["norm_activation"] == "dataset-wise":
        weights[f"dataset_average_activation_norm.{settings['hook_point_out']}"] = torch.tensor(NORM_OUT)
        weights[f"dataset_average_activation_norm.{settings['hook_point_in']}"] = torch.tensor(NORM_IN)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "sae_weights.safetensors")
    (path / "config.json").write_text(json.dumps(settings, indent=4))
    return path / "config.json", path / "sae_weights.safetensors"


def _activation(settings: dict[str, Any], drawn: _Drawn) -> Callable[[Tensor], Tensor]:
    threshold = drawn.log_threshold.double().exp()

    def act(z: Tensor) -> Tensor:
        if settings["act_fn"] == "jumprelu":
            return z * (z > threshold)
        z = z.relu()
        if settings["act_fn"] == "relu":
            return z
        values, index = z.topk(settings["top_k"], dim=-1)
        return torch.zeros_like(z).scatter(-1, index, values)

    return act


def _published(path: Path, settings: dict[str, Any], drawn: _Drawn, files: tuple[Path, Path], **more: Any) -> Published:
    W, b, V, c = (tensor.double() for tensor in (drawn.W, drawn.b, drawn.V, drawn.c))
    length = V.norm(dim=1) if settings["sparsity_include_decoder_norm"] else torch.ones(F, dtype=torch.float64)
    act = _activation(settings, drawn)
    is_transcoder = settings["hook_point_in"] != settings["hook_point_out"]

    def scales(x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if settings["norm_activation"] == "dataset-wise":
            return D**0.5 / NORM_IN, D**0.5 / (NORM_OUT if is_transcoder else NORM_IN)
        own = D**0.5 / x.norm(dim=-1, keepdim=True) if settings["norm_activation"] == "token-wise" else 1.0
        return own, own

    def encode(x: Tensor) -> Tensor:
        p = (x * scales(x)[0]) @ W.T + b
        return act(p * length) / length

    return Published(
        path=path,
        weights=files[1],
        config=files[0],
        d_in=D,
        encode=encode,
        reconstruct=lambda x: (encode(x) @ V + c) / scales(x)[1],
        **more,
    )


def linear(path: Path, seed: int, *, included: bool = False, rule: str | None = None) -> Published:
    """R1-Distill; where the norm counts by the file's word, SAELens leaves it out all the same."""
    settings, drawn = _settings(sparsity_include_decoder_norm=included, jump_relu_threshold=0.0), _Drawn(seed)
    weights = {
        "encoder.weight": drawn.W,
        "encoder.bias": drawn.b,
        "decoder.weight": drawn.V.T,
        "decoder.bias": drawn.c,
        "log_jumprelu_threshold": drawn.log_threshold,
    }
    files = _write(path, settings, weights)
    computed = settings | {"sparsity_include_decoder_norm": included and rule == "openmoss"}
    return _published(path, computed, drawn, files, choices={"gating": rule} if rule else {})


def plain(path: Path, seed: int, **changes: Any) -> Published:
    """The current spelling."""
    settings, drawn = _settings(**changes), _Drawn(seed)
    weights = {"W_E": drawn.W.T, "b_E": drawn.b, "W_D": drawn.V, "b_D": drawn.c}
    if settings["act_fn"] == "jumprelu":
        weights["activation_function.log_jumprelu_threshold"] = drawn.log_threshold
    if not settings["use_decoder_bias"]:
        drawn.c = torch.zeros_like(weights.pop("b_D"))
    return _published(path, settings, drawn, _write(path, settings, weights))


_TRANSCODER = {"hook_point_in": "blocks.3.ln2.hook_normalized", "hook_point_out": "blocks.3.hook_mlp_out"}

BUILDERS: dict[str, Builder] = {
    "openmoss_linear": linear,
    "openmoss_linear_saelens": partial(linear, included=True),
    "openmoss_linear_decoder_norm": partial(linear, included=True, rule="openmoss"),
    "openmoss_jumprelu": plain,
    "openmoss_jumprelu_plain_decoder": partial(plain, sparsity_include_decoder_norm=False),
    "openmoss_topk_transcoder": partial(plain, act_fn="topk", **_TRANSCODER),
    "openmoss_topk_plain_decoder": partial(plain, act_fn="topk", sparsity_include_decoder_norm=False),
    "openmoss_topk_token_wise": partial(plain, act_fn="topk", norm_activation="token-wise"),
    "openmoss_relu_inference": partial(plain, act_fn="relu", norm_activation="inference", use_decoder_bias=False),
}
