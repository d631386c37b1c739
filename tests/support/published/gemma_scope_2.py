"""Gemma Scope 2 as Google publishes it: SAEs, transcoders, and layers of cross-layer transcoders."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import Builder, Published

D_IN, D_OUT, D_SAE = 20, 24, 48
LAYER, N_LAYERS = 2, 5
REPO = "google/gemma-scope-2-1b-pt"
NORM_IN, NORM_OUT = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"


def config(kind: str, layer: str, reads: str, writes: str, *, affine: bool = False) -> dict[str, Any]:
    """``config.json``, every key of the published ones."""
    return {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": f"model.layers.{layer}.{reads}",
        "hf_hook_point_out": f"model.layers.{layer}.{writes}",
        "width": D_SAE * (N_LAYERS if kind == "clt" else 1),
        "l0": 20,
        "affine_connection": affine,
        "type": kind,
    }


def _tensors(seed: int, d_out: int, *, affine: bool, targets: int | None) -> dict[str, Tensor]:
    """Float32; decoder rows of very different norms, and none before ``LAYER`` where there are ``targets``."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(D_SAE, 1, generator=g) * 3 + 0.2
    w_dec = torch.randn(D_SAE, d_out, generator=g) * rows
    if targets is not None:
        w_dec = torch.randn(D_SAE, targets, d_out, generator=g) * rows[:, None]
        w_dec[:, :LAYER] = 0
    tensors = {
        "w_enc": torch.randn(D_IN, D_SAE, generator=g) / sqrt(D_IN),
        "w_dec": w_dec,
        "b_enc": torch.randn(D_SAE, generator=g) * 0.3,
        "b_dec": torch.randn(d_out, generator=g),
        "threshold": torch.rand(D_SAE, generator=g) + 0.3,
    }
    skip = {"affine_skip_connection": torch.randn(D_IN, d_out, generator=g)} if affine else {}
    return tensors | skip


def _write(
    folder: Path,
    seed: int,
    said: dict[str, Any] | None,
    *,
    d_out: int = D_OUT,
    affine: bool = False,
    clt: bool = False,
    repo_path: str = "",
) -> Published:
    tensors = _tensors(seed, d_out, affine=affine, targets=N_LAYERS if clt else None)
    weights = folder / (f"params_layer_{LAYER}.safetensors" if clt else "params.safetensors")
    save_file(tensors, weights)
    if said is not None:
        (folder / "config.json").write_text(json.dumps(said))
    wide = {name: tensor.double() for name, tensor in tensors.items()}

    def encode(x: Tensor) -> Tensor:
        pre = x @ wide["w_enc"] + wide["b_enc"]
        return pre.relu() * (pre > wide["threshold"])

    def reconstruct(x: Tensor) -> Tensor:
        vectors = [wide["w_dec"][:, target] for target in range(LAYER, N_LAYERS)] if clt else [wide["w_dec"]]
        outs = [encode(x) @ one for one in vectors]
        outs[0] = outs[0] + wide["b_dec"]
        if affine:
            outs[0] = outs[0] + x @ wide["affine_skip_connection"]
        return torch.cat(outs, dim=-1)

    return Published(
        path=weights if clt else folder,
        weights=weights,
        config=None if said is None else folder / "config.json",
        d_in=D_IN,
        encode=encode,
        reconstruct=reconstruct,
        repo=REPO if repo_path else None,
        repo_path=repo_path,
    )


def sae(folder: Path, seed: int) -> Published:
    """An SAE on the residual stream."""
    return _write(folder, seed, config("sae", "17", "output", "output"), d_out=D_IN)


def attention(folder: Path, seed: int) -> Published:
    """An SAE without config.json, known by where it was published."""
    return _write(folder, seed, None, d_out=D_IN, repo_path="attn_out_all/layer_11_width_16k_l0_small")


def transcoder(folder: Path, seed: int) -> Published:
    """A transcoder without skip connection."""
    return _write(folder, seed, config("transcoder", "17", NORM_IN, NORM_OUT))


def affine(folder: Path, seed: int) -> Published:
    """A transcoder with skip connection."""
    return _write(folder, seed, config("transcoder", "17", NORM_IN, NORM_OUT, affine=True), affine=True)


def clt(folder: Path, seed: int) -> Published:
    """One layer of a cross-layer transcoder."""
    return _write(folder, seed, config("clt", "{all}", NORM_IN, NORM_OUT), clt=True)


def clt_affine(folder: Path, seed: int) -> Published:
    """One layer of a cross-layer transcoder with skip connections."""
    said = config("clt", "{all}", NORM_IN, NORM_OUT, affine=True)
    return _write(folder, seed, said, affine=True, clt=True)


BUILDERS: dict[str, Builder] = {
    "gemma_scope_2_sae": sae,
    "gemma_scope_2_attention_without_config": attention,
    "gemma_scope_2_transcoder": transcoder,
    "gemma_scope_2_affine": affine,
    "gemma_scope_2_clt": clt,
    "gemma_scope_2_clt_affine": clt_affine,
}
