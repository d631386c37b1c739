"""Temporal SAEs as their authors publish them: tied TopK with one attention layer, and untied ReLU with two."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from support.published import Builder, Published

D, F, K, HEADS, NARROW, SCALE = 20, 48, 6, 4, 3, 0.21


def settings(**changes: Any) -> dict[str, Any]:
    """As training saves it; ``changes`` to the SAE's table."""
    sae = {
        "sae_type": "temporal",
        "sae_diff_type": "topk",
        "tied_weights": True,
        "block_id": 1,
        "exp_factor": F / D,
        "kval_topk": K,
        "n_heads": HEADS,
        "n_attn_layers": 1,
        "bottleneck_factor": NARROW,
        "gamma_reg": 10,
        "scaling_factor": SCALE,
    }
    return {
        "deploy": True,
        "tag": "scratch",
        "seed": 42,
        "device_id": "cuda:0",
        "data": {"epochs": 1, "context_length": 500, "batch_size": 100, "dtype": "bfloat16"},
        "llm": {"model_hf_name": "google/gemma-2-2b", "tokenizer_hf_name": "google/gemma-2-2b", "dimin": D},
        "sae": sae | changes,
        "optimizer": {"learning_rate": 0.001, "decay_lr": True},
        "eval": {"save_tables": False},
        "log": {"save_interval": 20000, "wandb_project_name": "TemporalSAE_test"},
    }


def weights(seed: int, *, layers: int, tied: bool) -> dict[str, Tensor]:
    """Large enough that features, which are divided by four times the width, are of the order of 1."""
    dice = torch.Generator().manual_seed(seed)
    found = {"D": torch.randn(F, D, generator=dice) * 12, "b": torch.randn(D, generator=dice) * 0.4}
    for layer in range(layers):
        for name, out in (("k_ctx", F // NARROW), ("q_target", F // NARROW), ("v_ctx", F), ("c_proj", F)):
            part = f"attn_layers.{layer}.{name}"
            found[f"{part}.weight"] = torch.randn(out, F, generator=dice) * 0.3
            found[f"{part}.bias"] = torch.randn(out, generator=dice) * 0.2
    return found if tied else found | {"E": torch.randn(D, F, generator=dice) * 12}


def predicted(z: Tensor, w: dict[str, Tensor], layer: int) -> Tensor:
    """z [T, F] -> what attention over earlier tokens makes of them [T, F]."""

    def project(name: str, value: Tensor) -> Tensor:
        part = f"attn_layers.{layer}.{name}"
        return value @ w[f"{part}.weight"].T + w[f"{part}.bias"]

    before = torch.cat([torch.zeros_like(z[:1]), z[:-1]])
    heads = [one.unflatten(-1, (HEADS, -1)).movedim(-2, 0) for one in (
        project("q_target", z), project("k_ctx", before), project("v_ctx", before)
    )]  # fmt: skip
    scores = heads[0] @ heads[1].mT / sqrt(heads[0].shape[-1])
    later = torch.ones(len(z), len(z), dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ heads[2]
    return project("c_proj", mixed.movedim(0, -2).flatten(-2)).relu()


def build(path: Path, seed: int, *, layers: int = 1, tied: bool = True, kind: str = "topk") -> Published:
    """One SAE; its tokens are one prefix."""
    config, file = path / "conf.yaml", path / "latest_ckpt.safetensors"
    w = weights(seed, layers=layers, tied=tied)
    config.write_text(yaml.safe_dump(settings(n_attn_layers=layers, tied_weights=tied, sae_diff_type=kind)))
    save_file(w, file)
    w = {name: one.double() for name, one in w.items()}
    E = w["D"].T if tied else w["E"]

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        rest, sum_of_guesses = x * SCALE - w["b"], torch.zeros(len(x), F, dtype=x.dtype)
        for layer in range(layers):
            guess = predicted((rest @ E / (4 * D)).relu(), w, layer)
            vector = guess @ w["D"]
            fit = (vector * rest).sum(-1, keepdim=True) / (vector.norm(dim=-1, keepdim=True) + 1e-6) ** 2
            sum_of_guesses, rest = sum_of_guesses + fit * guess, rest - fit * vector
        novel = (rest @ E / (4 * D)).relu()
        if kind == "topk":
            values, index = novel.topk(K, dim=-1)
            novel = torch.zeros_like(novel).scatter(-1, index, values)
        return novel, sum_of_guesses

    def reconstruct(x: Tensor) -> Tensor:
        novel, guess = split(x)
        return ((novel + guess) @ w["D"] + w["b"]) / SCALE

    return Published(
        path=path,
        weights=file,
        config=config,
        d_in=D,
        encode=lambda x: split(x)[0],
        reconstruct=reconstruct,
        free_keys=True,
        repo="canrager/temporalSAEs",
        repo_path="gemma-2-2B/layer_12/temporal",
    )


def untied(path: Path, seed: int) -> Published:
    """Two attention layers and an encoder of its own."""
    return build(path, seed, layers=2, tied=False, kind="relu")


BUILDERS: dict[str, Builder] = {"temporal_repo_tied": build, "temporal_repo_untied": untied}
