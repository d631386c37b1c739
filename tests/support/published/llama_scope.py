"""Llama Scope of 2024 as OpenMOSS wrote it, and both rules by which its features fire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.published import Builder, Published

D, F, THRESHOLD = 20, 48, 0.6


def _settings(**changes: Any) -> dict[str, Any]:
    """As published for layer 15, besides the sizes."""
    return {
        "device": "cpu",
        "seed": 42,
        "dtype": "torch.bfloat16",
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": 8,
        "d_model": D,
        "d_sae": F,
        "bias_init_method": "all_zero",
        "act_fn": "jumprelu",
        "jump_relu_threshold": THRESHOLD,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 5.8125, "out": 5.8125},
        "decoder_exactly_fixed_norm": False,
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "init_decoder_norm": 0.5,
        "init_encoder_norm": None,
        "init_encoder_with_decoder_transpose": True,
        "lp": 1,
        "l1_coefficient": 8e-05,
        "l1_coefficient_warmup_steps": 39062,
        "top_k": 6,
        "k_warmup_steps": 39062,
        "use_batch_norm_mse": True,
        "use_ghost_grads": False,
        "tp_size": 1,
        "ddp_size": 1,
    } | changes


def _weights(seed: int) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    decoder = torch.randn(D, F, generator=dice)
    return {
        "encoder.weight": torch.randn(F, D, generator=dice) * 0.3,
        "encoder.bias": torch.randn(F, generator=dice) * 0.3 - 0.3,
        "decoder.weight": decoder / decoder.norm(dim=0) * (0.3 + 2.2 * torch.rand(F, generator=dice)),
        "decoder.bias": torch.randn(D, generator=dice) * 0.4,
    }


def _write(path: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Path, Path]:
    config, file = path / "hyperparams.json", path / "checkpoints" / "final.safetensors"
    file.parent.mkdir()
    save_file(weights, file)
    config.write_text(json.dumps(settings, indent=4))
    return config, file


def _exact(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[F, D], [F], [F, D], [D]"""
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    W, b, V, c = (weights[name].double() for name in names)
    return W, b, V.T, c


def saelens(path: Path, seed: int) -> Published:
    """SAELens: activations scaled, threshold scaled with them, the decoder's norm left out."""
    weights = _weights(seed)
    config, file = _write(path, _settings(), weights)
    W, b, V, c = _exact(weights)
    s = D**0.5 / 5.8125

    def encode(x: Tensor) -> Tensor:
        p = s * x @ W.T + b
        return p.relu() * (p > THRESHOLD * s)

    def reconstruct(x: Tensor) -> Tensor:
        return (encode(x) @ V + c) / s

    return Published(path=path, weights=file, config=config, d_in=D, encode=encode, reconstruct=reconstruct)


def openmoss(path: Path, seed: int, **changes: Any) -> Published:
    """OpenMOSS: norms folded away and the decoder brought to unit length, then one threshold for all."""
    settings, weights = _settings(**changes), _weights(seed)
    config, file = _write(path, settings, weights)
    W, b, V, c = _exact(weights)
    norms = settings["dataset_average_activation_norm"]
    s_in, s_out = D**0.5 / norms["in"], D**0.5 / norms["out"]
    V, b, c = V * s_in / s_out, b / s_in, c / s_out
    if settings["sparsity_include_decoder_norm"]:
        length = V.norm(dim=1)
        W, b, V = W * length[:, None], b * length, V / length[:, None]

    def encode(x: Tensor) -> Tensor:
        p = (x - c if settings["apply_decoder_bias_to_pre_encoder"] else x) @ W.T + b
        if settings["act_fn"] == "relu":
            return p.relu()
        if settings["act_fn"] == "jumprelu":
            return torch.where(p > THRESHOLD, p, 0)
        values, index = p.relu().topk(settings["top_k"], dim=-1)
        return torch.zeros_like(p).scatter(-1, index, values)

    return Published(
        path=path,
        weights=file,
        config=config,
        d_in=D,
        encode=encode,
        reconstruct=lambda x: encode(x) @ V + c,
        choices={"gating": "openmoss"} if settings["act_fn"] == "jumprelu" else {},
    )


def plain_decoder(path: Path, seed: int) -> Published:
    """The norm does not count by the file's own word, so only the scale of the activations is taken out."""
    return openmoss(path, seed, sparsity_include_decoder_norm=False)


def transcoder(path: Path, seed: int) -> Published:
    """What it reads and what it writes have different mean norms."""
    return openmoss(
        path,
        seed,
        hook_point_in="blocks.8.ln2.hook_normalized",
        hook_point_out="blocks.8.hook_mlp_out",
        dataset_average_activation_norm={"in": 4.5, "out": 1.90625},
    )


def topk(path: Path, seed: int) -> Published:
    """Ranked, without a threshold, and centred."""
    return openmoss(path, seed, act_fn="topk", jump_relu_threshold=0.0, apply_decoder_bias_to_pre_encoder=True)


def token_wise(path: Path, seed: int) -> Published:
    """Every token brought to the same length; the reconstruction is in the model's own units again."""
    weights = _weights(seed)
    settings = _settings(
        norm_activation="token-wise",
        dataset_average_activation_norm=None,
        act_fn="relu",
        sparsity_include_decoder_norm=False,
    )
    config, file = _write(path, settings, weights)
    W, b, V, c = _exact(weights)

    def encode(x: Tensor) -> Tensor:
        return (x * D**0.5 / x.norm(dim=-1, keepdim=True) @ W.T + b).relu()

    def reconstruct(x: Tensor) -> Tensor:
        return (encode(x) @ V + c) * x.norm(dim=-1, keepdim=True) / D**0.5

    return Published(path=path, weights=file, config=config, d_in=D, encode=encode, reconstruct=reconstruct)


BUILDERS: dict[str, Builder] = {
    "llama_scope_saelens": saelens,
    "llama_scope_openmoss": openmoss,
    "llama_scope_plain_decoder": plain_decoder,
    "llama_scope_transcoder": transcoder,
    "llama_scope_topk": topk,
    "llama_scope_token_wise": token_wise,
}
