"""SAELens' two files as version 6.54 writes them, as its training runs leave them, and as versions before 6.0 did."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import Builder, Published

D_IN, D_OUT, D_SAE, K, SCALE, THETA = 20, 24, 48, 6, 0.37, 0.55

Weights: TypeAlias = dict[str, Tensor]


class Norm(NamedTuple):
    """What goes into an encoder, and what comes out of a decoder for the same token."""

    into: Callable[[Tensor], Tensor]
    out: Callable[[Tensor, Tensor], Tensor]


def _layer_norm_in(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.std(-1, keepdim=True) + 1e-5)


def _layer_norm_out(r: Tensor, x: Tensor) -> Tensor:
    return r * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)


NORMS = {
    "none": Norm(lambda x: x, lambda r, x: r),
    "layer_norm": Norm(_layer_norm_in, _layer_norm_out),
    "constant_norm_rescale": Norm(
        lambda x: x * sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True),
        lambda r, x: r * x.norm(dim=-1, keepdim=True) / sqrt(x.shape[-1]),
    ),
}


def _drawn(architecture: str, d_out: int, seed: int) -> Weights:
    """Float32 as on disk, decoder rows of very different norms."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, by: float = 0.3) -> Tensor:
        return torch.randn(*shape, generator=g) * by

    w = {"W_enc": normal(D_IN, D_SAE, by=0.2), "b_dec": normal(d_out)}
    w["W_dec"] = normal(D_SAE, d_out) * (0.3 + 2 * torch.rand(D_SAE, 1, generator=g))
    own = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    w |= {name: normal(D_SAE) - 0.2 for name in own}
    if architecture.startswith("jumprelu"):
        w["threshold"] = normal(D_SAE).abs() + 0.1
        # A threshold below zero lets nothing negative through.
        w["threshold"][::4] *= -1
    if architecture.endswith("batchtopk"):
        w["topk_threshold"] = torch.tensor(THETA, dtype=torch.float64)
    if "skip" in architecture:
        w["W_skip"] = normal(d_out, D_IN)
    return w


def _act(architecture: str, w: Weights, q: Tensor, norms: Tensor) -> Tensor:
    """q [tokens, d_sae], before any bias."""
    if architecture == "gated":
        return (q * w["r_mag"].exp() + w["b_mag"]).relu() * (q + w["b_gate"] > 0)
    p = (q + w["b_enc"]) * norms
    if architecture in ("topk", "abstopk"):
        index = (p if architecture == "topk" else p.abs()).topk(K, dim=-1).indices
        kept = torch.zeros_like(p).scatter(-1, index, p.gather(-1, index))
        return kept.relu() if architecture == "topk" else kept
    threshold = w.get("threshold", w.get("topk_threshold", torch.tensor(0.0)))
    return p * ((p > threshold) & (p > 0))


def _config(architecture: str, norm: str, *, centre: bool, **own: Any) -> dict[str, Any]:
    """``cfg.json`` of version 6.54."""
    base = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cuda", "apply_b_dec_to_input": centre}
    base |= {"normalize_activations": norm, "reshape_activations": "none"}
    metadata = {
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": "6.54.12",
        "model_name": "gpt2",
        "hook_name": "blocks.3.hook_resid_post",
        "hook_head_index": None,
        "prepend_bos": True,
        "l0": 7.5,
    }
    if "transcoder" in architecture:
        base["d_out"] = D_OUT
        metadata |= {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    return base | {"metadata": metadata} | own | {"architecture": architecture}


def _write(path: Path, config: dict[str, Any], weights: Weights) -> tuple[Path, Path]:
    (path / "cfg.json").write_text(json.dumps(config))
    save_file({name: one.contiguous() for name, one in weights.items()}, path / "sae_weights.safetensors")
    return path / "cfg.json", path / "sae_weights.safetensors"


def _inference(
    path: Path,
    seed: int,
    architecture: str,
    *,
    norm: str = "none",
    centre: bool = True,
    rescales: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> Published:
    is_transcoder = "transcoder" in architecture
    w = {name: one.to(dtype) for name, one in _drawn(architecture, D_OUT if is_transcoder else D_IN, seed).items()}
    own = {} if rescales is None else {"k": K, "rescale_acts_by_decoder_norm": rescales}
    own |= {"dtype": str(dtype).removeprefix("torch.")}
    config, weights = _write(path, _config(architecture, norm, centre=centre, **own), w)
    return _published(path, config, weights, w, architecture, norm, centre=centre, rescales=bool(rescales))


def _published(
    path: Path,
    config: Path,
    weights: Path,
    w: Weights,
    architecture: str,
    norm: str,
    *,
    centre: bool,
    rescales: bool = False,
    scale: float = 1.0,
    **more: Any,
) -> Published:
    """``scale`` multiplies the input, as SAELens folds it: decoder rows are divided by it, and so are their norms."""
    w = {name: one.double() for name, one in w.items()}
    norms = w["W_dec"].norm(dim=1) / scale if rescales else torch.ones(D_SAE, dtype=torch.float64)
    if rescales and "topk_threshold" in w:
        w["topk_threshold"] = w["topk_threshold"] / scale
    b_dec = w["b_dec"] if centre else torch.zeros(D_IN)

    def encode(x: Tensor) -> Tensor:
        return _act(architecture, w, (NORMS[norm].into(x) * scale - b_dec) @ w["W_enc"], norms)

    def reconstruct(x: Tensor) -> Tensor:
        decoded = (encode(x) / norms @ w["W_dec"] / scale) + w["b_dec"] / scale
        if "transcoder" in architecture:
            return decoded + x @ w["W_skip"].T if "W_skip" in w else decoded
        return NORMS[norm].out(decoded, x)

    return Published(
        path=path, weights=weights, config=config, d_in=D_IN, encode=encode, reconstruct=reconstruct, **more
    )


_TRAINED = {
    "jumprelu": {
        "decoder_init_norm": 0.1, "jumprelu_init_threshold": 0.01, "jumprelu_bandwidth": 0.05,
        "jumprelu_sparsity_loss_mode": "step", "l0_coefficient": 1.0, "l0_warm_up_steps": 0,
        "pre_act_loss_coefficient": None, "jumprelu_tanh_scale": 4.0, "jumprelu_ste_to_input": False, "target_l0": None,
    },
    "matryoshka_batchtopk": {
        "decoder_init_norm": 0.1, "k": 12.5, "use_sparse_activations": False, "aux_loss_coefficient": 1.0,
        "topk_threshold_lr": 0.01, "matryoshka_widths": [12, 24, 48], "use_matryoshka_aux_loss": False,
    },
    "batchtopk": {
        "decoder_init_norm": 0.1, "k": 12.5, "use_sparse_activations": False, "aux_loss_coefficient": 1.0,
        "topk_threshold_lr": 0.01, "rescale_acts_by_decoder_norm": False,
    },
}  # fmt: skip


def _jumprelu_checkpoint(path: Path, seed: int) -> Published:
    w = _drawn("jumprelu", D_IN, seed)
    stored = {name: one for name, one in w.items() if name != "threshold"}
    stored["log_threshold"] = w["threshold"].abs().log()
    files = _write(path, _config("jumprelu", "none", centre=True, **_TRAINED["jumprelu"]), stored)
    w["threshold"] = stored["log_threshold"].double().exp()
    return _published(path, *files, w, "jumprelu", "none", centre=True)


def _scaled_checkpoint(path: Path, seed: int, architecture: str) -> Published:
    """Before training ended: the input's scale is beside the SAE."""
    w = _drawn(architecture, D_IN, seed)
    config = _config(architecture, "expected_average_only_in", centre=True, **_TRAINED[architecture])
    files = _write(path, config, w)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": SCALE, "has_whitening": False}))
    rescales = config.get("rescale_acts_by_decoder_norm", True)
    return _published(path, *files, w, architecture, "none", centre=True, rescales=rescales, scale=SCALE)


def _whitened_checkpoint(path: Path, seed: int, architecture: str, *, centre: bool) -> Published:
    w = _drawn(architecture, D_IN, seed)
    files = _write(path, _config(architecture, "covariance_whitening", centre=centre), w)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": None, "has_whitening": True}))
    g = torch.Generator().manual_seed(seed + 1)
    matrix = torch.eye(D_IN, dtype=torch.float64) + 0.1 * torch.randn(D_IN, D_IN, generator=g, dtype=torch.float64)
    mean, back = 0.5 * torch.randn(D_IN, generator=g, dtype=torch.float64), torch.linalg.inv(matrix)
    save_file(
        {"mean": mean, "matrix": matrix, "inverse_matrix": back.contiguous()},
        path / "activation_whitening.safetensors",
    )
    inner = _published(path, *files, w, architecture, "none", centre=centre)
    assert inner.reconstruct is not None

    def encode(x: Tensor) -> Tensor:
        return inner.encode((x - mean) @ matrix)

    def reconstruct(x: Tensor) -> Tensor:
        assert inner.reconstruct is not None
        return inner.reconstruct((x - mean) @ matrix) @ back + mean

    return Published(path=path, weights=files[1], config=files[0], d_in=D_IN, encode=encode, reconstruct=reconstruct)


def _with_choice(path: Path, seed: int) -> Published:
    """The scale is nowhere in the files."""
    w = _drawn("standard", D_IN, seed)
    files = _write(path, _config("standard", "expected_average_only_in", centre=False), w)
    return _published(path, *files, w, "standard", "none", centre=False, scale=SCALE, choices={"scale": SCALE})


def _flat(**own: Any) -> dict[str, Any]:
    """``cfg.json`` of versions 1 to 5: the SAE's settings among those of the run."""
    return {
        "model_name": "gpt2-small", "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cuda",
        "dataset_path": "Skylion007/openwebtext", "context_size": 128, "l1_coefficient": 8e-05, "lr": 0.0004,
        "use_ghost_grads": True, "expansion_factor": 8, "seed": 42, "log_to_wandb": True, "n_checkpoints": 10,
    } | own  # fmt: skip


def _legacy_finetuned(path: Path, seed: int) -> Published:
    """Version 2: features are scaled before they are decoded."""
    w = _drawn("standard", D_IN, seed)
    factors = 0.5 + torch.rand(D_SAE, generator=torch.Generator().manual_seed(seed + 1))
    hook = {"hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3, "hook_point_head_index": None}
    files = _write(path, _flat(**hook, normalize_activations=False), w | {"scaling_factor": factors})
    inner = dict(w) | {"W_dec": w["W_dec"].double() * factors.double()[:, None]}
    return _published(path, *files, inner, "standard", "none", centre=True, optional=frozenset({"scaling_factor"}))


def _legacy_tanh(path: Path, seed: int) -> Published:
    w = _drawn("standard", D_IN, seed)
    v5 = {"hook_name": "blocks.3.attn.hook_z", "hook_layer": 3, "hook_head_index": None, "architecture": "standard"}
    v5 |= {"activation_fn_str": "tanh-relu", "activation_fn_kwargs": {}, "finetuning_scaling_factor": False}
    files = _write(path, _flat(**v5, apply_b_dec_to_input=False, normalize_activations="none"), w)
    inner = _published(path, *files, w, "standard", "none", centre=False)

    def encode(x: Tensor) -> Tensor:
        return inner.encode(x).tanh()

    def reconstruct(x: Tensor) -> Tensor:
        return encode(x) @ w["W_dec"].double() + w["b_dec"].double()

    return Published(path=path, weights=files[1], config=files[0], d_in=D_IN, encode=encode, reconstruct=reconstruct)


def _legacy_topk(path: Path, seed: int) -> Published:
    """As OpenAI's SAEs for GPT-2 were converted: the architecture is standard, the activation function is not."""
    w = _drawn("topk", D_IN, seed)
    v5 = {"hook_name": "blocks.3.hook_mlp_out", "hook_layer": 3, "hook_head_index": None, "architecture": "standard"}
    v5 |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "finetuning_scaling_factor": False}
    files = _write(path, _flat(**v5, apply_b_dec_to_input=True, normalize_activations="layer_norm"), w)
    return _published(path, *files, w, "topk", "layer_norm", centre=True)


BUILDERS: dict[str, Builder] = {
    "saelens_standard": partial(_inference, architecture="standard", norm="layer_norm"),
    "saelens_standard_half": partial(_inference, architecture="standard", dtype=torch.bfloat16),
    "saelens_gated": partial(_inference, architecture="gated", norm="constant_norm_rescale"),
    "saelens_jumprelu": partial(_inference, architecture="jumprelu", centre=False),
    "saelens_topk": partial(_inference, architecture="topk", rescales=False),
    "saelens_topk_rescaled": partial(_inference, architecture="topk", rescales=True),
    "saelens_abstopk_rescaled": partial(_inference, architecture="abstopk", rescales=True, norm="layer_norm"),
    "saelens_transcoder": partial(_inference, architecture="transcoder", centre=False),
    "saelens_skip_transcoder": partial(_inference, architecture="skip_transcoder", norm="layer_norm", centre=False),
    "saelens_jumprelu_transcoder": partial(_inference, architecture="jumprelu_transcoder", centre=False),
    "saelens_jumprelu_skip_transcoder": partial(
        _inference, architecture="jumprelu_skip_transcoder", norm="constant_norm_rescale", centre=False
    ),
    "saelens_scale_unknown": _with_choice,
    "saelens_checkpoint_jumprelu": _jumprelu_checkpoint,
    "saelens_checkpoint_batchtopk": partial(_scaled_checkpoint, architecture="batchtopk"),
    "saelens_checkpoint_matryoshka": partial(_scaled_checkpoint, architecture="matryoshka_batchtopk"),
    "saelens_checkpoint_whitened": partial(_whitened_checkpoint, architecture="standard", centre=True),
    "saelens_checkpoint_whitened_gated": partial(_whitened_checkpoint, architecture="gated", centre=False),
    "saelens_legacy_finetuned": _legacy_finetuned,
    "saelens_legacy_tanh": _legacy_tanh,
    "saelens_legacy_topk": _legacy_topk,
}
