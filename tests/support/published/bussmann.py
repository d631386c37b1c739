"""Bussmann's two repositories: every kind of SAE, with the settings that they save."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.published import Builder, Published

D, F, K, THRESHOLD = 20, 48, 6, 1.2


def settings(kind: str, *, normed: bool) -> dict[str, Any]:
    """What is not a plain value is saved as text."""
    return {
        "seed": 49,
        "batch_size": 4096,
        "lr": 0.0003,
        "num_tokens": 1000000000,
        "l1_coeff": 0.0,
        "beta1": 0.9,
        "beta2": 0.99,
        "max_grad_norm": 100000,
        "seq_len": 128,
        "dtype": "torch.float32",
        "model_dtype": "torch.bfloat16",
        "model_name": "gpt2-small",
        "site": "resid_pre",
        "layer": 8,
        "act_size": D,
        "dict_size": F,
        "device": "cuda",
        "model_batch_size": 512,
        "num_batches_in_buffer": 10,
        "dataset_path": "Skylion007/openwebtext",
        "wandb_project": "batchtopk",
        "input_unit_norm": normed,
        "perf_log_freq": 1000,
        "sae_type": kind,
        "checkpoint_freq": 10000,
        "n_batches_to_dead": 20,
        "top_k": K,
        "top_k_aux": 512,
        "aux_penalty": 0.03125,
        "bandwidth": 0.001,
        "hook_point": "blocks.8.hook_resid_pre",
        "name": f"gpt2-small_blocks.8.hook_resid_pre_{F}_{kind}_{K}_0.0003",
        "group_sizes": f"[8, 16, {F - 24}]",
    }


def weights(kind: str, seed: int) -> dict[str, Tensor]:
    """By the names of the state dict."""
    dice = torch.Generator().manual_seed(seed)
    decoder = torch.randn(F, D, generator=dice)
    w = {
        "b_dec": torch.randn(D, generator=dice) * 0.5,
        "b_enc": torch.randn(F, generator=dice) * 0.3 - 0.7,
        "W_enc": torch.randn(D, F, generator=dice) * 0.3,
        "W_dec": decoder / decoder.norm(dim=1, keepdim=True) * (0.3 + 2.2 * torch.rand(F, 1, generator=dice)),
    }
    if kind == "jumprelu":
        return w | {"jumprelu.log_threshold": torch.randn(F, generator=dice) * 0.4 - 0.5}
    return w | ({"threshold": torch.tensor(THRESHOLD)} if "batch" in kind or "matryoshka" in kind else {})


def build(kind: str, path: Path, seed: int, *, normed: bool = True) -> Published:
    """One SAE of that kind."""
    config, file, w = path / "config.json", path / "sae.pt", weights(kind, seed)
    config.write_text(json.dumps(settings(kind, normed=normed), indent=4))
    torch.save(w, file)
    w = {name: one.double() for name, one in w.items()}

    def norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not normed:
            return x, torch.zeros(1), torch.ones(1)
        mean, deviation = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
        return (x - mean) / (deviation + 1e-5), mean, deviation

    def encode(x: Tensor) -> Tensor:
        n = norm(x)[0]
        if kind == "jumprelu":
            p = (n @ w["W_enc"] + w["b_enc"]).relu()
            return p * (p > w["jumprelu.log_threshold"].exp())
        q = (n - w["b_dec"]) @ w["W_enc"]
        if kind == "vanilla":
            return (q + w["b_enc"]).relu()
        if kind == "topk":
            values, index = q.relu().topk(K, dim=-1)
            return torch.zeros_like(q).scatter(-1, index, values)
        return torch.where(q.relu() > w["threshold"], q.relu(), 0)

    def reconstruct(x: Tensor) -> Tensor:
        _, mean, deviation = norm(x)
        return (encode(x) @ w["W_dec"] + w["b_dec"]) * deviation + mean

    return Published(path=path, weights=file, config=config, d_in=D, encode=encode, reconstruct=reconstruct)


BUILDERS: dict[str, Builder] = {
    "bussmann_vanilla": partial(build, "vanilla"),
    "bussmann_topk": partial(build, "topk"),
    "bussmann_topk_unnormed": partial(build, "topk", normed=False),
    "bussmann_jumprelu": partial(build, "jumprelu"),
    "bussmann_batchtopk": partial(build, "batchtopk"),
    "bussmann_batch_topk": partial(build, "batch-topk", normed=False),
    "bussmann_matryoshka": partial(build, "global-matryoshka-topk"),
}
