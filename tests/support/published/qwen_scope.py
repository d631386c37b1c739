"""Qwen-Scope: transposed weights, and k in the repository's settings, in its name, or with the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.published import Builder, Published

D, F, K = 20, 48, 6
REPO = f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
SETTINGS = {
    "model_type": "topk_sae",
    "base_model": "Qwen/Qwen3-1.7B-Base",
    "d_model": D,
    "d_sae": F,
    "k": K,
    "num_layers": 28,
    "hook_point": "resid_post",
    "dtype": "float32",
}


def build(path: Path, seed: int, **changes: Any) -> Published:
    """One layer's SAE; ``changes`` to where it says that it comes from."""
    dice = torch.Generator().manual_seed(seed)
    decoder = torch.randn(D, F, generator=dice)
    weights = {
        "W_enc": torch.randn(F, D, generator=dice) * 0.3,
        "W_dec": decoder / decoder.norm(dim=0) * (0.3 + 2.2 * torch.rand(F, generator=dice)),
        "b_enc": torch.randn(F, generator=dice) * 0.3 - 1.4,  # some tokens have fewer than k positive ones
        "b_dec": torch.randn(D, generator=dice) * 0.5,
    }
    file = path / "layer3.sae.pt"
    torch.save(weights, file)
    W, V, b, c = (one.double() for one in weights.values())

    def encode(x: Tensor) -> Tensor:
        values, index = (x @ W.T + b).topk(K, dim=-1)
        return torch.zeros(len(x), F, dtype=x.dtype).scatter(-1, index, values.relu())

    origin = {"repo": REPO, "repo_path": file.name, "config": None}
    return Published(
        path=file,
        weights=file,
        d_in=D,
        encode=encode,
        reconstruct=lambda x: encode(x) @ V.T + c,
        **(origin | changes),
    )


def with_settings(path: Path, seed: int) -> Published:
    """The repository's settings were downloaded as well."""
    (path / "config.json").write_text(json.dumps(SETTINGS))
    return build(path, seed, repo=None, config=path / "config.json")


def alone(path: Path, seed: int) -> Published:
    """Only the file, so that the user has to say."""
    return build(path, seed, repo=None, choices={"k": K})


BUILDERS: dict[str, Builder] = {
    "qwen_scope": build,
    "qwen_scope_with_settings": with_settings,
    "qwen_scope_alone": alone,
}
