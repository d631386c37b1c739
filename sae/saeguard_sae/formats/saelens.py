"""SAELens' current format (6.x): ``cfg.json`` with a ``metadata`` table, and ``sae_weights.safetensors``.

Decoder-norm rescaling is folded into the weights. Conventions that are not supported yet are refused by name.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeguard_sae.activations import Activation, Gated, JumpReLU, ReLU, TopK
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats.found import Found
from saeguard_sae.site import Point, Site

NAME = "saelens"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

_BASE_KEYS = {
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "metadata",
    "k",
    "rescale_acts_by_decoder_norm",
}
# What only training reads; it does not change what the weights compute.
_TRAINING_KEYS = {
    "aux_loss_coefficient",
    "decoder_init_norm",
    "matryoshka_widths",
    "topk_threshold_lr",
    "use_matryoshka_aux_loss",
    "use_sparse_activations",
}
_POINTS: dict[str, Point] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_act",
    "hook_mlp_out": "mlp_out",
    "hook_mlp_in": "resid_mid",
}
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_BLOCK_MODULE = re.compile(r"(?:transformer\.h|gpt_neox\.layers|model\.layers)\.(\d+)")


def recognises(path: Path) -> bool:
    """Both files are there."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def load(path: Path) -> Found:
    """The SAE in the folder, in float32.

    Raises:
        ValueError: a convention that is not supported, an unknown key, missing or surplus weights.
    """
    config = _read_config(path / CONFIG)
    try:
        weights = load_file(path / WEIGHTS)
    except SafetensorError as err:
        raise ValueError(f"{WEIGHTS}: {err}") from err
    dictionary = _dictionary(config, {name: tensor.float() for name, tensor in weights.items()})
    _check_size(config, dictionary)
    return Found(dictionary, _site(config["metadata"]), (path / CONFIG, path / WEIGHTS))


def save(
    dictionary: Dictionary,
    path: Path,
    *,
    site: Site,
    model_name: str,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes a ReLU, JumpReLU, gated or TopK dictionary so that SAELens 6 reads it back; each file whole or not at all.

    Args:
        site: where it belongs; written as SAELens' hook name.
        dtype: of the weights on disk.
        metadata: more entries for the ``metadata`` table, such as ``context_size``.
    """
    act = dictionary.activation
    names = {"relu": "standard", "jumprelu": "jumprelu", "gated": "gated", "topk": "topk"}
    config: dict[str, Any] = {
        "architecture": names[act.name],
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.centre,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if isinstance(act, TopK):
        config |= {"k": act.k, "rescale_acts_by_decoder_norm": False}
    own = {"sae_lens_version": "6.54.12", "model_name": model_name, "hook_name": hook_name(site), "prepend_bos": True}
    config["metadata"] = own | (metadata or {})
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in dictionary.tensors().items()}
    if isinstance(act, Gated):
        del weights["b_enc"]
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / f"{WEIGHTS}.part")
    (path / f"{CONFIG}.part").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(path / f"{WEIGHTS}.part", path / WEIGHTS)
    os.replace(path / f"{CONFIG}.part", path / CONFIG)


def hook_name(site: Site) -> str:
    """A site as TransformerLens spells it."""
    if site.point == "embed":
        return "hook_embed"
    return f"blocks.{site.layer}.{next(hook for hook, point in _POINTS.items() if point == site.point)}"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as err:
        raise ValueError(f"{CONFIG}: not JSON: {err}") from err
    if not isinstance(config, dict) or not isinstance(config.get("metadata"), dict):
        raise ValueError(f"{CONFIG}: no metadata table; files of SAELens before 6.0 are not supported, convert them")
    unknown = config.keys() - _BASE_KEYS - _TRAINING_KEYS
    if unknown:
        raise ValueError(f"{CONFIG}: unknown key {sorted(unknown)[0]!r}: what it changes is not known")
    _refuse_conventions(config)
    return config


def _refuse_conventions(config: dict[str, Any]) -> None:
    norm = config.get("normalize_activations", "none")
    if norm not in ("none", None):
        raise ValueError(f"{CONFIG}: normalize_activations {norm!r} is not supported, only 'none'; fold it first")
    if config.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise ValueError(f"{CONFIG}: reshape_activations {config['reshape_activations']!r} is not supported")
    metadata = config["metadata"]
    if metadata.get("hook_head_index") is not None:
        raise ValueError(f"{CONFIG}: hook_head_index: SAEs of a single head are not supported")
    if (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        raise ValueError(f"{CONFIG}: center_writing_weights: SAEs of models processed that way are not supported")


def _dictionary(config: dict[str, Any], weights: dict[str, Tensor]) -> Dictionary:
    architecture = config.get("architecture")
    for name in ("W_enc", "W_dec", "b_dec"):
        if name not in weights:
            raise ValueError(f"{WEIGHTS}: no {name}")
    W_enc, W_dec, b_dec = (weights.pop(name) for name in ("W_enc", "W_dec", "b_dec"))
    norms = W_dec.norm(dim=1) if _rescales(config) else torch.ones(W_dec.shape[:1])
    activation = _activation(architecture, config, weights)
    b_enc = torch.zeros(W_dec.shape[0]) if isinstance(activation, Gated) else weights.pop("b_enc", None)
    if b_enc is None or weights:
        raise ValueError(f"{WEIGHTS}: {'no b_enc' if b_enc is None else f'unexpected {sorted(weights)}'}")
    centre = config.get("apply_b_dec_to_input", True)
    if not _rescales(config):
        return Dictionary(W_enc, b_enc, W_dec, b_dec, activation, centre)
    return Dictionary(W_enc * norms, b_enc * norms, W_dec / norms[:, None], b_dec, activation, centre)


def _rescales(config: dict[str, Any]) -> bool:
    # Only the top-k family knows the key; its training configurations default to True.
    trained = config["architecture"] in ("batchtopk", "matryoshka_batchtopk")
    return bool(config.get("rescale_acts_by_decoder_norm", trained))


def _activation(architecture: str | None, config: dict[str, Any], weights: dict[str, Tensor]) -> Activation:
    try:
        match architecture:
            case "standard":
                return ReLU()
            case "jumprelu":
                return JumpReLU(weights.pop("threshold"))
            case "gated":
                return Gated(*(weights.pop(name) for name in ("b_gate", "b_mag", "r_mag")))
            case "topk":
                return TopK(int(config["k"]))
            case "batchtopk" | "matryoshka_batchtopk":
                threshold = weights.pop("topk_threshold")
                return JumpReLU(threshold.expand(weights["b_enc"].shape).contiguous())
    except KeyError as err:
        raise ValueError(f"a {architecture} SAE needs {err.args[0]!r}") from err
    known = "standard, jumprelu, gated, topk, batchtopk, matryoshka_batchtopk"
    raise ValueError(f"{CONFIG}: architecture {architecture!r} is not supported; supported are {known}")


def _check_size(config: dict[str, Any], dictionary: Dictionary) -> None:
    for key, size in (("d_in", dictionary.d_in), ("d_sae", dictionary.d_sae)):
        if config.get(key, size) != size:
            raise ValueError(f"{CONFIG}: {key} is {config[key]}, but the weights have {size}")


def _site(metadata: dict[str, Any]) -> Site | None:
    name = metadata.get("hook_name")
    if not isinstance(name, str):
        return None
    if name == "hook_embed":
        return Site(0, "embed")
    if match := _HOOK.fullmatch(name):
        point = _POINTS.get(match[2])
        return Site(int(match[1]), point) if point else None
    if match := _BLOCK_MODULE.fullmatch(name):
        return Site(int(match[1]), "resid_post")
    return None
