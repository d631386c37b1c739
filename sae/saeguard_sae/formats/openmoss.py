"""OpenMOSS since 2025: ``config.json`` beside ``sae_weights.safetensors``, whose tensors are spelled in two ways.

As torch's linear layers until that summer (Llama Scope R1-Distill), as ``W_E`` and ``W_D`` since (llamascopium).
Values are in the units of training: activations scaled, decoder as stored.
"""

from __future__ import annotations

from math import inf, sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from saeguard_sae.dictionary import ActivationFunction, Dictionary, JumpReLU, ReLU, TopK
from saeguard_sae.formats.parsed import (
    Choices,
    Conventions,
    NormScales,
    ParsedSae,
    Place,
    Source,
    Tensors,
    check_keys,
    check_shapes,
    check_size,
    choice,
    flag,
    in_and_out,
    json_object,
    number,
    safetensors,
    scaled,
    whole,
)

NAME = "openmoss"
CONFIG = "config.json"
WEIGHTS = "sae_weights.safetensors"
NORMS = "dataset_average_activation_norm"
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_PLAIN = ("W_E", "b_E", "W_D", "b_D")
THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")

Rule: TypeAlias = Literal["openmoss", "saelens"]

_TINY = 1e-30
_KNOWN = {
    "act_fn", "apply_decoder_bias_to_pre_encoder", "d_model", "expansion_factor", "hook_point_in", "hook_point_out",
    "norm_activation", "sae_type", "sparsity_include_decoder_norm", "top_k", "use_decoder_bias", "use_glu_encoder",
}  # fmt: skip
# What only training and the choice of a device or kernel read. jump_relu_threshold is left over from before thresholds
# were trained, and a decoder whose norm was forced is stored with that norm.
_TRAINING = {
    "circuit_tracing_mode", "device", "dtype", "force_unit_decoder_norm", "jump_relu_threshold",
    "jumprelu_threshold_grad_scale", "jumprelu_threshold_window", "promote_act_fn_dtype", "sae_pretrained_name_or_path",
    "sparsity_threshold_for_csr", "sparsity_threshold_for_triton_spmm_kernel", "strict_loading", "use_triton_kernel",
}  # fmt: skip


class _Rows(NamedTuple):
    """The weights with one row per feature, whichever way the file has them: [d_sae, d], [d_sae], [d_sae, d], [d]."""

    encoder: Tensor
    b_enc: Tensor
    decoder: Tensor
    b_dec: Tensor


def recognises(path: Path) -> bool:
    """Both files are there; beside ``cfg.json`` the weights would be SAELens'."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file() and not (path / "cfg.json").is_file()


def load(source: Source) -> ParsedSae:
    """The SAE or transcoder in the folder.

    Raises:
        ValueError: a convention that is not supported, an unknown key, missing or surplus weights, or a bad choice.
    """
    config, notes = _config(source.path / CONFIG), Conventions()
    tensors = safetensors(source.path / WEIGHTS)
    reads, writes = _places(config)
    used = {"gating": _has_two_rules(config, tensors), "scale": config.get("norm_activation") == "dataset-wise"}
    rule = _rule(config, source.choices, bool(writes), notes) if used["gating"] else "openmoss"
    return ParsedSae(
        dictionary=_dictionary(config, tensors, rule, source.choices, notes),
        files=(source.path / CONFIG, source.path / WEIGHTS),
        reads=reads,
        writes=writes,
        conventions=notes.all(),
        used=frozenset(name for name, makes_a_difference in used.items() if makes_a_difference),
    )


def _config(file: Path) -> dict[str, Any]:
    config = json_object(file)
    if "sae_type" in config:
        choice(config, "sae_type", ("sae", "transcoder"), CONFIG)
    check_keys(config, _KNOWN | _TRAINING, CONFIG)
    choice(config, "act_fn", ("jumprelu", "relu", "topk"), CONFIG)
    if flag(config, "use_glu_encoder", False, CONFIG):
        raise ValueError(f"{CONFIG}: use_glu_encoder: gated linear encoders are not supported")
    return config


def _places(config: dict[str, Any]) -> tuple[Place | None, tuple[Place, ...]]:
    return in_and_out(config.get("hook_point_in"), config.get("hook_point_out"), f"{CONFIG}: hook_point_out")


def _is_linear(tensors: Tensors) -> bool:
    return any(name.startswith(("encoder.", "decoder.")) for name in tensors.names)


def _has_two_rules(config: dict[str, Any], tensors: Tensors) -> bool:
    """Whether SAELens reads such a file too: it knows R1-Distill alone."""
    return config["act_fn"] == "jumprelu" and _is_linear(tensors)


def _rule(config: dict[str, Any], choices: Choices, is_transcoder: bool, notes: Conventions) -> Rule:
    """Whose rule decides which features fire.

    SAELens' by default where it can read the SAE, because feature ids and dashboards were made with it.
    """
    rule: Rule = choices.gating or ("openmoss" if is_transcoder else "saelens")
    if rule == "saelens" and is_transcoder:
        raise ValueError("gating saelens: SAELens does not read these transcoders; choose gating openmoss")
    if rule == "saelens" and _centres(config):
        raise ValueError(
            f"{CONFIG}: apply_decoder_bias_to_pre_encoder is true, which SAELens leaves out; choose gating openmoss"
        )
    own = "p * |decoder row|" if flag(config, "sparsity_include_decoder_norm", True, CONFIG) else "p"
    said = {
        "saelens": f"saelens: p > threshold, as dashboards were made; OpenMOSS' own rule is {own} > threshold",
        "openmoss": f"openmoss: {own} > threshold; SAELens, which dashboards were made with, has p > threshold",
    }
    notes.note("gating", said[rule], "the user" if choices.gating else "the format")
    return rule


def _centres(config: dict[str, Any]) -> bool:
    asked = flag(config, "apply_decoder_bias_to_pre_encoder", False, CONFIG)
    return asked and flag(config, "use_decoder_bias", True, CONFIG)


def _dictionary(
    config: dict[str, Any], tensors: Tensors, rule: Rule, choices: Choices, notes: Conventions
) -> Dictionary:
    is_transcoder, centre = bool(_places(config)[1]), _centres(config)
    if is_transcoder and centre:
        raise ValueError(f"{CONFIG}: apply_decoder_bias_to_pre_encoder: not supported for a transcoder")
    rows = _weights(config, tensors)
    scales = _scales(config, tensors, rows.b_dec.numel(), choices, notes)
    norms = rows.decoder.norm(dim=1).clamp_min(_TINY) if _counts_norm(config, rule, notes) else None
    activation = _activation(config, tensors, norms, rows.b_enc)
    tensors.close()
    notes.note("centring", centre, f"{CONFIG}: apply_decoder_bias_to_pre_encoder")
    # A threshold takes the norm in; a ranking needs it in the encoder, and TopK's gain takes it out of the value again.
    ranked = norms if norms is not None and isinstance(activation, TopK) else torch.ones_like(rows.b_enc)
    return Dictionary(
        W_enc=scaled(rows.encoder, ranked * scales.inward).T,
        b_enc=rows.b_enc * ranked,
        W_dec=scaled(rows.decoder, torch.full_like(rows.b_enc, 1 / scales.outward)),
        b_dec=rows.b_dec / scales.outward,
        activation=activation,
        centre=centre,
        normalisation=scales.normalisation,
        is_transcoder=is_transcoder,
    )


def _weights(config: dict[str, Any], tensors: Tensors) -> _Rows:
    linear = _is_linear(tensors)
    names = _LINEAR if linear else _PLAIN
    W_enc, b_enc, W_dec = (tensors.take(name) for name in names[:3])
    has_bias = flag(config, "use_decoder_bias", True, CONFIG)
    b_dec = tensors.take(names[3]) if has_bias else torch.zeros(W_dec.shape[:1] if linear else W_dec.shape[1:])
    n, d = b_enc.numel(), b_dec.numel()
    shapes = ((n, d), (n,), (d, n), (d,)) if linear else ((d, n), (n,), (n, d), (d,))
    found = zip(names, (W_enc, b_enc, W_dec, b_dec), shapes, strict=True)
    check_shapes({name: (tensor, shape) for name, tensor, shape in found}, WEIGHTS)
    _check_sizes(config, d, n)
    return _Rows(W_enc, b_enc, W_dec.T, b_dec) if linear else _Rows(W_enc.T, b_enc, W_dec, b_dec)


def _check_sizes(config: dict[str, Any], d_model: int, d_sae: int) -> None:
    check_size(config, "d_model", d_model, CONFIG)
    if "expansion_factor" in config:
        stated = int(d_model * number(config, "expansion_factor", CONFIG))
        if stated != d_sae:
            raise ValueError(f"{CONFIG}: d_model * expansion_factor is {stated}, but the weights have {d_sae}")


def _counts_norm(config: dict[str, Any], rule: Rule, notes: Conventions) -> bool:
    """Whether features are compared by what they add to the output rather than by their value."""
    if config["act_fn"] == "relu":
        return False
    counts = flag(config, "sparsity_include_decoder_norm", True, CONFIG) and rule == "openmoss"
    source = f"{CONFIG}: sparsity_include_decoder_norm" if rule == "openmoss" else "SAELens"
    notes.note("decoder norm counts in the gate", counts, source)
    return counts


def _activation(config: dict[str, Any], tensors: Tensors, norms: Tensor | None, b_enc: Tensor) -> ActivationFunction:
    if config["act_fn"] == "relu":
        return ReLU()
    if config["act_fn"] == "topk":
        return TopK(whole(config, "top_k", CONFIG), gain=None if norms is None else 1 / norms)
    name = next((one for one in THRESHOLDS if one in tensors), THRESHOLDS[not _is_linear(tensors)])
    threshold = tensors.take(name).exp()
    check_shapes({name: (threshold, tuple(b_enc.shape))}, WEIGHTS)
    return JumpReLU(threshold if norms is None else threshold / norms)


def _scales(config: dict[str, Any], tensors: Tensors, d_model: int, choices: Choices, notes: Conventions) -> NormScales:
    kind = choice(config, "norm_activation", ("dataset-wise", "token-wise", "inference", "none"), CONFIG)
    is_transcoder = bool(_places(config)[1])
    if kind == "dataset-wise":
        return _dataset_wise(config, tensors, d_model, choices, notes)
    tensors.ignore(*(name for name in tensors.names if name.startswith(f"{NORMS}.")))
    notes.note("activation scale", {"token-wise": "of each token"}.get(kind, "none"), f"{CONFIG}: norm_activation")
    if kind == "token-wise" and is_transcoder:
        raise ValueError(f"{CONFIG}: norm_activation token-wise: what a transcoder writes would have no known scale")
    return NormScales(1.0, 1.0, "constant_norm_rescale" if kind == "token-wise" else "none")


def _dataset_wise(
    config: dict[str, Any], tensors: Tensors, d_model: int, choices: Choices, notes: Conventions
) -> NormScales:
    is_transcoder, inward = bool(_places(config)[1]), f"{NORMS}.{config.get('hook_point_in')}"
    if inward not in tensors and not is_transcoder:
        return _scale_given(inward, choices, notes)
    scale = _factor(tensors, inward, d_model, notes, "activation scale")
    if choices.scale is not None and abs(choices.scale / scale - 1) > 0.01:
        raise ValueError(f"scale is {choices.scale:g}, but {WEIGHTS}: {inward} says {scale:g}")
    if not is_transcoder:
        return NormScales(scale, scale)
    outward = f"{NORMS}.{config.get('hook_point_out')}"
    return NormScales(scale, _factor(tensors, outward, d_model, notes, "activation scale of what it writes"))


def _scale_given(missing: str, choices: Choices, notes: Conventions) -> NormScales:
    if not choices.scale:
        raise ValueError(
            f"{CONFIG}: norm_activation is dataset-wise, but {WEIGHTS} has no {missing}; "
            "give scale = sqrt(d_model) / mean |x|"
        )
    notes.note("activation scale", choices.scale, choices.scale_said_by)
    return NormScales(choices.scale, choices.scale)


def _factor(tensors: Tensors, name: str, d_model: int, notes: Conventions, said: str) -> float:
    norm = tensors.scalar(name)
    if not 0 < norm < inf:
        raise ValueError(f"{WEIGHTS}: {name} must be a number above 0, got {norm:g}")
    notes.note(said, sqrt(d_model) / norm, f"{WEIGHTS}: {name}")
    return sqrt(d_model) / norm
