"""EleutherAI's sparsify, now and before 2025."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.published import Builder, Published

D, F, K = 20, 48, 6
NOW = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": F,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}


def weights(seed: int, *, skip: bool) -> dict[str, Tensor]:
    """By the names of the file."""
    dice = torch.Generator().manual_seed(seed)
    decoder = torch.randn(F, D, generator=dice)
    w = {
        "encoder.weight": torch.randn(F, D, generator=dice) * 0.3,
        "encoder.bias": torch.randn(F, generator=dice) * 0.3 - 1.4,  # some tokens have fewer than k positive ones
        "W_dec": decoder / decoder.norm(dim=1, keepdim=True) * (0.3 + 2.2 * torch.rand(F, 1, generator=dice)),
        "b_dec": torch.randn(D, generator=dice) * 0.5,
    }
    return w | ({"W_skip": torch.randn(D, D, generator=dice) * 0.2} if skip else {})


def build(path: Path, seed: int, said: dict[str, Any], hookpoint: str, *, centre: bool = True) -> Published:
    """One SAE or transcoder in a folder of that name."""
    folder, w = path / hookpoint, weights(seed, skip=bool(said.get("skip_connection")))
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(said))
    save_file(w, folder / "sae.safetensors")
    w = {name: one.double() for name, one in w.items()}

    def encode(x: Tensor) -> Tensor:
        p = (x - w["b_dec"] if centre else x) @ w["encoder.weight"].T + w["encoder.bias"]
        kept = torch.zeros_like(p)
        if said.get("signed"):
            index = p.abs().topk(K, dim=-1).indices
            return kept.scatter(-1, index, p.gather(-1, index))
        if said.get("activation") == "groupmax":
            values, place = p.relu().unflatten(-1, (K, -1)).max(dim=-1)
            return kept.scatter(-1, place + torch.arange(0, F, F // K), values)
        values, index = p.relu().topk(K, dim=-1)
        return kept.scatter(-1, index, values)

    def reconstruct(x: Tensor) -> Tensor:
        out = encode(x) @ w["W_dec"] + w["b_dec"]
        return out + x @ w["W_skip"].T if "W_skip" in w else out

    return Published(
        path=folder,
        weights=folder / "sae.safetensors",
        config=folder / "cfg.json",
        d_in=D,
        encode=encode,
        reconstruct=reconstruct,
    )


def topk(path: Path, seed: int) -> Published:
    """An autoencoder of a layer's output."""
    return build(path, seed, NOW, "layers.10")


def groupmax(path: Path, seed: int) -> Published:
    """The largest of each of k groups."""
    return build(path, seed, NOW | {"activation": "groupmax"}, "h.5")


def transcoder(path: Path, seed: int) -> Published:
    """From what an MLP reads to what it writes."""
    return build(path, seed, NOW | {"transcode": True}, "layers.5.mlp", centre=False)


def skip_transcoder(path: Path, seed: int) -> Published:
    """The same with a linear path beside it."""
    said = NOW | {"transcode": True, "skip_connection": True, "multi_topk": True}
    return build(path, seed, said, "layers.5.mlp", centre=False)


def old_skip_transcoder(path: Path, seed: int) -> Published:
    """Of the time when b_dec was taken from its input, and the file did not say what it is."""
    said = {
        name: NOW[name] for name in ("expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "d_in")
    }
    return build(path, seed, said | {"skip_connection": True}, "layers.5.mlp")


def signed(path: Path, seed: int) -> Published:
    """The first version, which could keep negative features; one of several seeds of the same layer."""
    said = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K, "signed": True, "d_in": D}
    return build(path, seed, said, "layers.3/seed1")


BUILDERS: dict[str, Builder] = {
    "sparsify_topk": topk,
    "sparsify_groupmax": groupmax,
    "sparsify_transcoder": transcoder,
    "sparsify_skip_transcoder": skip_transcoder,
    "sparsify_old_skip_transcoder": old_skip_transcoder,
    "sparsify_signed": signed,
}
