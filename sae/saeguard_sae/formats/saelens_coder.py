"""The SAE that SAELens' weights describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.activations import Activation, Gated, JumpReLU, ReLU, TanhReLU
from saeguard_sae.coder import SparseCoder
from saeguard_sae.dictionary import Dictionary, check_finite, feature_major
from saeguard_sae.formats import files, saelens_folds
from saeguard_sae.formats.files import Tensors
from saeguard_sae.formats.found import Choices, Conventions
from saeguard_sae.formats.saelens_arrival import Arrival
from saeguard_sae.formats.saelens_settings import CONFIG, WEIGHTS, Settings
from saeguard_sae.pursuit import MatchingPursuit
from saeguard_sae.selections import AbsTopK, TopK
from saeguard_sae.temporal import ATTENTION, Temporal

_BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
_RESCALING_SINCE = (6, 14)


@dataclass(frozen=True, slots=True)
class Parts:
    """What an SAE is built from, and where its conventions are noted."""

    settings: Settings
    weights: Tensors
    arrives: Arrival
    choices: Choices
    said: Conventions

    @property
    def table(self) -> Mapping[str, Any]:
        """The settings that decide the arithmetic."""
        return self.settings.table

    def note(self, name: str, value: object, key: str) -> None:
        """A convention that ``key`` of the config, or its default, decides."""
        self.said.note(name, value, self.settings.source(key))


def build(parts: Parts) -> SparseCoder:
    """The SAE, with everything folded that SAELens computes apart from the weights.

    Raises:
        ValueError: weights or settings that are missing, surplus or disagree.
    """
    parts.note("architecture", parts.settings.architecture, "architecture")
    built = _built(parts)
    parts.weights.close()
    for key, size in (("d_in", built.d_in), ("d_sae", built.d_sae), ("d_out", built.d_out)):
        files.check_size(parts.table, key, size, CONFIG)
    return built


def _built(parts: Parts) -> SparseCoder:
    match parts.settings.architecture:
        case "matching_pursuit":
            return _pursuit(parts)
        case "temporal":
            return _temporal(parts)
        case _:
            return _linear(parts)


def _centre(parts: Parts) -> bool:
    key = "apply_b_dec_to_input"
    centre = files.flag(parts.table, key, True, CONFIG)
    if centre and parts.settings.is_transcoder:
        raise ValueError(f"{CONFIG}: {key} must be false for a transcoder, as SAELens has it")
    parts.note("centring", centre, key)
    return centre


def _linear(parts: Parts) -> Dictionary:
    """In SAELens' order: its own folds come before rescaling, which they change, and whitening after it."""
    dictionary, arrives, rescales = _unfolded(parts), parts.arrives, _rescales(parts)
    if (factors := _finetuning(parts, dictionary.d_sae)) is not None:
        dictionary = saelens_folds.finetuned(dictionary, factors)
    if arrives.scale != 1:
        dictionary = saelens_folds.scaled(dictionary, arrives.scale, rescales=rescales)
    if rescales:
        dictionary = saelens_folds.rescaled(dictionary)
    if arrives.whitening is not None:
        dictionary = saelens_folds.unwhitened(dictionary, arrives.whitening)
    return dictionary


def _unfolded(parts: Parts) -> Dictionary:
    """The weights as they are."""
    settings, weights = parts.settings, parts.weights
    activation = _activation(parts)
    return Dictionary(
        feature_major(weights.take("W_enc")),
        torch.zeros_like(activation.b_gate) if isinstance(activation, Gated) else weights.take("b_enc"),
        weights.take("W_dec"),
        weights.take("b_dec"),
        activation,
        centre=_centre(parts),
        normalisation=parts.arrives.normalisation,
        is_transcoder=settings.is_transcoder,
        W_skip=weights.take("W_skip") if "skip" in settings.architecture else None,
    )


def _activation(parts: Parts) -> Activation:
    settings, weights = parts.settings, parts.weights
    match settings.architecture:
        case "standard" | "transcoder" | "skip_transcoder":
            return TanhReLU() if settings.is_tanh else ReLU()
        case "gated":
            return Gated(*(weights.take(name) for name in ("b_gate", "b_mag", "r_mag")))
        case "topk":
            return TopK(_k(parts))
        case "abstopk":
            return AbsTopK(_k(parts))
        case "batchtopk" | "matryoshka_batchtopk":
            return JumpReLU(_batch_threshold(parts))
        case _:
            return JumpReLU(_threshold(weights))


def _threshold(weights: Tensors) -> Tensor:
    # Older training checkpoints hold its logarithm.
    if "log_threshold" in weights and "threshold" not in weights:
        logarithm = weights.take("log_threshold")
        check_finite("log_threshold", logarithm)
        return logarithm.exp()
    return weights.take("threshold")


def _batch_threshold(parts: Parts) -> Tensor:
    """[d_sae] what stands in for the choice among a whole training batch when SAELens exports the SAE."""
    threshold = parts.weights.scalar("topk_threshold")
    parts.said.note("selection", f"above {threshold:g}, not among a batch", f"{WEIGHTS}: topk_threshold")
    return torch.full_like(parts.weights.take("b_enc"), threshold)


def _k(parts: Parts) -> int:
    table, choice = parts.table, parts.choices.k
    if table.get("k") is not None:
        k = files.whole(table, "k", CONFIG)
        parts.note("k", k, "k")
        return k
    if choice is None:
        raise ValueError(f"{CONFIG}: no k, the number of features kept per token; give k")
    parts.said.note("k", choice, "the user")
    return choice


def _rescales(parts: Parts) -> bool:
    """Whether pre-activations are multiplied by the decoder's norms; only the top-k family knows that."""
    key, settings = "rescale_acts_by_decoder_norm", parts.settings
    if settings.architecture not in ("topk", "abstopk", *_BATCH_TOPK):
        return False
    # Checkpoints of batch top-k from before SAELens 6.14 do not say it, because nothing did it then.
    older = settings.trained_by is not None and settings.trained_by < _RESCALING_SINCE
    rescales = files.flag(parts.table, key, settings.architecture in _BATCH_TOPK and not older, CONFIG)
    parts.note("feature units", "times the decoder row's norm" if rescales else "as stored", key)
    return rescales


def _finetuning(parts: Parts, d_sae: int) -> Tensor | None:
    """[d_sae] factors of SAELens before 6.0, unless they are all 1, as it long wrote them for every SAE."""
    weights = parts.weights
    name = "finetuning_scaling_factor" if "finetuning_scaling_factor" in weights else "scaling_factor"
    if (factors := weights.take_if(name)) is None:
        return None
    if tuple(factors.shape) != (d_sae,):
        raise ValueError(f"{WEIGHTS}: {name} has shape {tuple(factors.shape)}, expected {(d_sae,)}")
    if torch.allclose(factors, torch.ones_like(factors)):
        return None
    if parts.settings.is_finetuned is False:
        raise ValueError(f"{WEIGHTS}: {name} is not 1, but {CONFIG} does not say finetuning_scaling_factor")
    parts.said.note("decoder scaled per feature", True, f"{WEIGHTS}: {name}")
    return factors


def _pursuit(parts: Parts) -> MatchingPursuit:
    W_dec, b_dec = parts.weights.take("W_dec"), parts.weights.take("b_dec")
    table, scale = {"residual_threshold": 1e-2} | dict(parts.table), parts.arrives.scale
    most = table.get("max_iterations")
    return MatchingPursuit(
        W_dec,
        # Scaling the input scales residuals, features and threshold alike: what is unscaled finds the same features.
        b_dec / scale,
        max_iterations=b_dec.numel() if most is None else files.whole(table, "max_iterations", CONFIG),
        residual_threshold=files.number(table, "residual_threshold", CONFIG) / scale,
        stop_on_duplicate_support=files.flag(table, "stop_on_duplicate_support", True, CONFIG),
        centre=_centre(parts),
        normalisation=parts.arrives.normalisation,
    )


def _temporal(parts: Parts) -> Temporal:
    table, weights = parts.table, parts.weights
    tied = files.flag(table, "tied_weights", True, CONFIG)
    W_dec = weights.take("W_dec")
    return Temporal(
        W_dec.transpose(0, -1) if tied else weights.take("W_enc"),
        W_dec,
        weights.take("b_dec"),
        tuple(_attention(weights, index) for index in range(files.whole(table, "n_attn_layers", CONFIG))),
        n_heads=files.whole(table, "n_heads", CONFIG),
        k=_temporal_k(table),
        scale=parts.arrives.scale,
        centre=_centre(parts),
        tied=tied,
    )


def _attention(weights: Tensors, index: int) -> dict[str, Tensor]:
    names = [f"{name}.{part}" for name in ATTENTION for part in ("weight", "bias")]
    return {name: weights.take(f"attn_layers.{index}.{name}") for name in names}


def _temporal_k(table: Mapping[str, Any]) -> int | None:
    kind = files.choice({"sae_diff_type": "topk"} | dict(table), "sae_diff_type", ("relu", "topk"), CONFIG)
    if kind == "relu" or table.get("kval_topk") is None:
        return None
    return files.whole(table, "kval_topk", CONFIG)
