"""Gemma Scope 1 as Google publishes it: ``params.npz`` alone; the repository and its path say the rest."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import Builder, Published

D_MODEL, D_SAE = 20, 48
REPO = "google/gemma-scope-2b-pt-"
LAYER = "layer_5/width_16k/average_l0_71"
EMBEDDING = "embedding/width_4k/average_l0_6"


def _arrays(seed: int) -> dict[str, Tensor]:
    """Float32, [d_in, d_sae] and [d_sae, d_in]; decoder rows of very different norms."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(D_SAE, 1, generator=g) * 3 + 0.2
    return {
        "W_enc": torch.randn(D_MODEL, D_SAE, generator=g) / sqrt(D_MODEL),
        "W_dec": torch.randn(D_SAE, D_MODEL, generator=g) * rows,
        "b_enc": torch.randn(D_SAE, generator=g) * 0.3,
        "b_dec": torch.randn(D_MODEL, generator=g),
        "threshold": torch.rand(D_SAE, generator=g) + 0.3,
    }


def _write(folder: Path, seed: int, kind: str | None, path: str, *, lower: bool = False) -> Published:
    arrays = _arrays(seed)
    root = sqrt(D_MODEL) if path.startswith("embedding") else 1.0
    stored = {"W_enc": arrays["W_enc"] * root, "W_dec": arrays["W_dec"] / root}
    named = {name.replace("W_", "w_") if lower else name: array.numpy() for name, array in (arrays | stored).items()}
    np.savez(folder / "params.npz", **named)
    wide = {name: array.double() for name, array in (arrays | stored).items()}

    def encode(x: Tensor) -> Tensor:
        pre = x @ (wide["W_enc"] / root) + wide["b_enc"]
        return pre.relu() * (pre > wide["threshold"])

    def reconstruct(x: Tensor) -> Tensor:
        return encode(x) @ (wide["W_dec"] * root) + wide["b_dec"]

    return Published(
        path=folder,
        weights=folder / "params.npz",
        config=None,
        d_in=D_MODEL,
        encode=encode,
        reconstruct=reconstruct,
        repo=None if kind is None else REPO + kind,
        repo_path=path,
    )


BUILDERS: dict[str, Builder] = {
    "gemma_scope_res": lambda folder, seed: _write(folder, seed, "res", LAYER),
    "gemma_scope_mlp_lower_case": lambda folder, seed: _write(folder, seed, "mlp", LAYER, lower=True),
    "gemma_scope_att": lambda folder, seed: _write(folder, seed, "att", LAYER),
    "gemma_scope_transcoders": lambda folder, seed: _write(folder, seed, "transcoders", LAYER),
    "gemma_scope_embedding": lambda folder, seed: _write(folder, seed, "res", EMBEDDING),
    "gemma_scope_of_unknown_origin": lambda folder, seed: _write(folder, seed, None, ""),
}
