"""circuit-tracer's cross-layer transcoders: ``W_enc_N.safetensors`` and ``W_dec_N.safetensors`` of each layer."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from . import Builder, Published

D_MODEL, D_SAE = 20, 48
LAYER, N_LAYERS = 1, 4
CONFIG: dict[str, Any] = {
    "model_name": "google/gemma-2-2b",
    "model_kind": "cross_layer_transcoder",
    "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
}


def _tensors(seed: int, layer: int, *, jump: bool) -> dict[str, Tensor]:
    """One layer's, float32; decoder rows of very different norms."""
    g = torch.Generator().manual_seed(seed + layer)
    rows = torch.rand(D_SAE, 1, 1, generator=g) * 3 + 0.2
    found = {
        "W_enc": torch.randn(D_SAE, D_MODEL, generator=g) / sqrt(D_MODEL),
        "W_dec": torch.randn(D_SAE, N_LAYERS - layer, D_MODEL, generator=g) * rows,
        "b_enc": torch.randn(D_SAE, generator=g) * 0.3 - 0.8,
        "b_dec": torch.randn(D_MODEL, generator=g),
    }
    more = {"threshold": torch.rand(D_SAE, generator=g) * 0.5, "W_skip": torch.randn(D_MODEL, D_MODEL, generator=g)}
    return found | (more if jump else {})


def _save(folder: Path, tensors: dict[str, Tensor], layer: int) -> None:
    named = {f"{name}_{layer}": tensor for name, tensor in tensors.items()}
    W_dec = named.pop(f"W_dec_{layer}")
    save_file(named, folder / f"W_enc_{layer}.safetensors")
    save_file({f"W_dec_{layer}": W_dec}, folder / f"W_dec_{layer}.safetensors")


def _published(path: Path, folder: Path, tensors: dict[str, Tensor]) -> Published:
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    threshold = wide.get("threshold", torch.zeros(D_SAE, dtype=torch.float64))

    def encode(x: Tensor) -> Tensor:
        pre = x @ wide["W_enc"].T + wide["b_enc"]
        return pre * (pre > threshold)

    def reconstruct(x: Tensor) -> Tensor:
        outs = [encode(x) @ wide["W_dec"][:, target] for target in range(N_LAYERS - LAYER)]
        outs[0] = outs[0] + wide["b_dec"]
        if "W_skip" in wide:
            outs[0] = outs[0] + x @ wide["W_skip"]
        return torch.cat(outs, dim=-1)

    return Published(
        path=path,
        weights=folder / f"W_enc_{LAYER}.safetensors",
        config=folder / "config.yaml",
        d_in=D_MODEL,
        encode=encode,
        reconstruct=reconstruct,
        optional=frozenset({f"threshold_{LAYER}", f"W_skip_{LAYER}"}),
    )


def relu(folder: Path, seed: int) -> Published:
    """Every layer's files; one of them is named."""
    layers = [_tensors(seed, layer, jump=False) for layer in range(N_LAYERS)]
    for layer, tensors in enumerate(layers):
        _save(folder, tensors, layer)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return _published(folder / f"W_enc_{LAYER}.safetensors", folder, layers[LAYER])


def jumprelu_skip(folder: Path, seed: int) -> Published:
    """One layer's files alone, with thresholds and a skip connection; the folder is named."""
    tensors = _tensors(seed, LAYER, jump=True)
    _save(folder, tensors, LAYER)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return _published(folder, folder, tensors)


BUILDERS: dict[str, Builder] = {"circuit_tracer_clt_relu": relu, "circuit_tracer_clt_jumprelu_skip": jumprelu_skip}
