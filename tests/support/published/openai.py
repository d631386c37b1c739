"""OpenAI's sparse_autoencoder: the first version's ReLU and the fifth's TopK."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.published import Builder, Published

D, F, K = 20, 48, 6


def held(activation: str, seed: int, after: str = "ReLU") -> dict[str, Any]:
    """Everything in the file."""
    dice = torch.Generator().manual_seed(seed)
    decoder = torch.randn(D, F, generator=dice)
    found = {
        "pre_bias": torch.randn(D, generator=dice) * 0.5,
        # So low that some tokens have fewer than k positive ones.
        "latent_bias": torch.randn(F, generator=dice) * 0.3 - 1.6,
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
        "latents_activation_frequency": torch.ones(F),
        "latents_mean_square": torch.zeros(F),
        "encoder.weight": torch.randn(F, D, generator=dice) * 0.3,
        "decoder.weight": decoder / decoder.norm(dim=0) * (0.3 + 2.2 * torch.rand(F, generator=dice)),
        "activation": activation,
    }
    state = OrderedDict([("k", K), ("postact_fn", after)]) if activation == "TopK" else OrderedDict()
    return found | {"activation_state_dict": state} | {f"activation.{name}": one for name, one in state.items()}


def build(activation: str, path: Path, seed: int, *, after: str = "ReLU") -> Published:
    """One SAE with that activation."""
    file, found = path / "6.pt", held(activation, seed, after)
    torch.save(found, file)
    names = ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
    W, b, V, c = (found[name].double() for name in names)
    topk = activation == "TopK"

    def norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not topk:
            return x, torch.zeros(1), torch.ones(1)
        mean = x.mean(dim=-1, keepdim=True)
        deviation = (x - mean).std(dim=-1, keepdim=True)
        return (x - mean) / (deviation + 1e-5), mean, deviation

    def encode(x: Tensor) -> Tensor:
        p = (norm(x)[0] - c) @ W.T + b
        if not topk:
            return p.relu()
        values, index = p.topk(K, dim=-1)
        return torch.zeros_like(p).scatter(-1, index, values.relu() if after == "ReLU" else values)

    def reconstruct(x: Tensor) -> Tensor:
        _, mean, deviation = norm(x)
        return (encode(x) @ V.T + c) * deviation + mean

    needed = {*names, "activation_state_dict"} if topk else {*names}
    return Published(
        path=file,
        weights=file,
        config=None,
        d_in=D,
        encode=encode,
        reconstruct=reconstruct,
        optional=frozenset(found.keys() - needed),
    )


BUILDERS: dict[str, Builder] = {
    "openai_relu": partial(build, "ReLU"),
    "openai_topk": partial(build, "TopK"),
    "openai_topk_identity": partial(build, "TopK", after="Identity"),
}
