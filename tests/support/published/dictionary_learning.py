"""dictionary_learning: each of its classes, with the settings that its trainers and buffers write."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.published import Builder, Published

D, F, K, THRESHOLD = 20, 48, 6, 1.3


def settings(kind: str, **changes: Any) -> dict[str, Any]:
    """As a trainer of that class writes it; ``changes`` to the trainer's table."""
    trainer = {
        "trainer_class": "SomeTrainer",
        "dict_class": kind,
        "lr": 5e-05,
        "steps": 244140,
        "warmup_steps": 1000,
        "decay_start": 195312,
        "seed": 0,
        "activation_dim": D,
        "dict_size": F,
        "device": "cuda:0",
        "layer": 3,
        "lm_name": "EleutherAI/pythia-160m-deduped",
        "wandb_name": "SomeTrainer",
        "submodule_name": "resid_post_layer_3",
    }
    if kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        trainer |= {"k": K, "auxk_alpha": 0.03125, "threshold_beta": 0.999, "threshold_start_step": 1000}
    buffer = {
        "d_submodule": D,
        "io": "out",
        "n_ctxs": 244,
        "ctx_len": 1024,
        "refresh_batch_size": 4,
        "out_batch_size": 2048,
        "device": "cuda:0",
    }
    return {"trainer": trainer | changes, "buffer": buffer}


def weights(kind: str, seed: int) -> dict[str, Tensor]:
    """By the names and in the orientation of that class's state dict."""
    dice = torch.Generator().manual_seed(seed)
    decoder = torch.randn(D, F, generator=dice)
    w = {
        "encoder.weight": torch.randn(F, D, generator=dice) * 0.3,
        "encoder.bias": torch.randn(F, generator=dice) * 0.3 - 1.0,
        "decoder.weight": decoder / decoder.norm(dim=0) * (0.3 + 2.2 * torch.rand(F, generator=dice)),
    }
    centre = torch.randn(D, generator=dice) * 0.5
    top = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(THRESHOLD)}
    if kind == "AutoEncoder":
        return w | {"bias": centre}
    if kind == "AutoEncoderNew":
        return w | {"decoder.bias": centre}
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        return w | {"b_dec": centre} | top
    if kind == "GatedAutoEncoder":
        bias = w.pop("encoder.bias")
        magnitude = {name: torch.randn(F, generator=dice) * 0.3 for name in ("mag_bias", "r_mag")}
        return w | {"decoder_bias": centre, "gate_bias": bias} | magnitude
    plain = {
        "W_enc": w["encoder.weight"].T.contiguous(),
        "b_enc": w["encoder.bias"],
        "W_dec": w["decoder.weight"].T.contiguous(),
        "b_dec": centre,
    }
    if kind == "JumpReluAutoEncoder":
        return plain | {"threshold": 0.1 + 0.9 * torch.rand(F, generator=dice)}
    return plain | top | {"group_sizes": torch.tensor([8, 16, F - 24])}


def formula(kind: str, w: dict[str, Tensor]) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``encode`` and ``decode`` of the class, in float64."""
    w = {name: one.double() for name, one in w.items()}
    W = w["encoder.weight"].T if "encoder.weight" in w else w["W_enc"]
    V = w["decoder.weight"].T if "decoder.weight" in w else w["W_dec"]
    b = next((w[name] for name in ("encoder.bias", "b_enc") if name in w), torch.zeros(F, dtype=torch.float64))
    c = next(w[name] for name in ("bias", "decoder_bias", "decoder.bias", "b_dec") if name in w)
    if kind == "AutoEncoder":
        norms = V.norm(dim=1)
        W, b, V = W * norms, b * norms, V / norms[:, None]

    def encode(x: Tensor) -> Tensor:
        p = (x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - c) @ W + b
        if kind == "GatedAutoEncoder":
            return (w["r_mag"].exp() * p + w["mag_bias"]).relu() * (p + w["gate_bias"] > 0)
        if kind == "AutoEncoderTopK":
            values, index = p.relu().topk(K, dim=-1)
            return torch.zeros_like(p).scatter(-1, index, values)
        return p.relu() * (p.relu() > w["threshold"]) if "threshold" in w else p.relu()

    return encode, lambda f: f @ V + c


def build(kind: str, path: Path, seed: int) -> Published:
    """One SAE of that class."""
    config, file, w = path / "config.json", path / "ae.pt", weights(kind, seed)
    config.write_text(json.dumps(settings(kind), indent=4))
    torch.save(w, file)
    encode, decode = formula(kind, w)
    ignored = {"AutoEncoderTopK": {"k", "threshold"}, "BatchTopKSAE": {"k"}, "MatryoshkaBatchTopKSAE": {"k"}}
    return Published(
        path=path,
        weights=file,
        config=config,
        d_in=D,
        encode=encode,
        reconstruct=lambda x: decode(encode(x)),
        optional=frozenset(ignored.get(kind, ())),
        free_keys=True,
    )


def transcoder(path: Path, seed: int) -> Published:
    """Its buffer kept what an MLP reads beside what it writes."""
    published = build("AutoEncoder", path, seed)
    said = settings("AutoEncoder", submodule_name="mlp_layer_3")
    said["buffer"]["io"] = "in_and_out"
    (path / "config.json").write_text(json.dumps(said))
    return published


BUILDERS: dict[str, Builder] = {
    "dictionary_learning_standard": partial(build, "AutoEncoder"),
    "dictionary_learning_new": partial(build, "AutoEncoderNew"),
    "dictionary_learning_gated": partial(build, "GatedAutoEncoder"),
    "dictionary_learning_jumprelu": partial(build, "JumpReluAutoEncoder"),
    "dictionary_learning_topk": partial(build, "AutoEncoderTopK"),
    "dictionary_learning_batchtopk": partial(build, "BatchTopKSAE"),
    "dictionary_learning_matryoshka": partial(build, "MatryoshkaBatchTopKSAE"),
    "dictionary_learning_transcoder": transcoder,
}
