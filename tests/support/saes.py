"""SAEs with random weights, written as SAELens writes them, and what they compute by the plain formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", "batchtopk")
_K = 6


@dataclass(frozen=True)
class PlainSae:
    """Weights as on disk, and the SAE's two functions written out without our code."""

    architecture: str
    weights: dict[str, Tensor]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def plain_sae(architecture: str, d_in: int, d_sae: int, seed: int, *, centre: bool = True) -> PlainSae:
    """A random SAE whose features fire on about a third of random inputs of norm sqrt(d_in)."""
    w = _weights(architecture, d_in, d_sae, seed)

    def encode(x: Tensor) -> Tensor:
        q = (x - w["b_dec"] if centre else x) @ w["W_enc"]
        return _ENCODE[architecture](q, w)

    def decode(f: Tensor) -> Tensor:
        if architecture == "batchtopk":
            f = f / w["W_dec"].norm(dim=1)
        return f @ w["W_dec"] + w["b_dec"]

    return PlainSae(architecture, w, encode, decode)


def _weights(architecture: str, d_in: int, d_sae: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, by: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * by

    w = {
        "W_enc": normal(d_in, d_sae, by=d_in**-0.5),
        "W_dec": normal(d_sae, d_in, by=0.6 * d_in**-0.5),
        "b_dec": normal(d_in, by=0.1),
    }
    own = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}
    w |= {name: normal(d_sae, by=0.2) for name in own.get(architecture, ("b_enc",))}
    if architecture == "jumprelu":
        w["threshold"] = w["threshold"].abs()
    if architecture == "batchtopk":
        w["topk_threshold"] = torch.tensor(0.4, dtype=torch.float64)
    return w


def _gated(q: Tensor, w: dict[str, Tensor]) -> Tensor:
    return torch.relu(q * torch.exp(w["r_mag"]) + w["b_mag"]) * (q + w["b_gate"] > 0)


def _batchtopk(q: Tensor, w: dict[str, Tensor]) -> Tensor:
    p = (q + w["b_enc"]) * w["W_dec"].norm(dim=1)
    return torch.relu(p) * (p > w["topk_threshold"].float())


def _jumprelu(q: Tensor, w: dict[str, Tensor]) -> Tensor:
    p = q + w["b_enc"]
    return torch.relu(p) * (p > w["threshold"])


def _topk(q: Tensor, w: dict[str, Tensor]) -> Tensor:
    p = q + w["b_enc"]
    values, index = p.topk(_K, dim=-1)
    return torch.zeros_like(p).scatter(-1, index, values.relu())


def _standard(q: Tensor, w: dict[str, Tensor]) -> Tensor:
    return torch.relu(q + w["b_enc"])


_ENCODE: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "standard": _standard,
    "jumprelu": _jumprelu,
    "topk": _topk,
    "gated": _gated,
    "batchtopk": _batchtopk,
}


def save_sae(sae: PlainSae, path: Path, hook_name: str, *, centre: bool = True) -> Path:
    """Writes ``cfg.json`` and ``sae_weights.safetensors`` by the format's description."""
    d_sae, d_in = sae.weights["W_dec"].shape
    config = {
        "architecture": sae.architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": centre,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": hook_name, "prepend_bos": True},
    }
    if sae.architecture in ("topk", "batchtopk"):
        config |= {"k": _K, "rescale_acts_by_decoder_norm": sae.architecture == "batchtopk"}
    path.mkdir(parents=True, exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(config))
    save_file(sae.weights, path / "sae_weights.safetensors")
    return path
