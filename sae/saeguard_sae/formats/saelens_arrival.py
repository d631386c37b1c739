"""What SAELens does to an activation before it is encoded: its ``normalize_activations`` and the files behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from saeguard_sae import releases
from saeguard_sae.formats import files
from saeguard_sae.formats.found import Conventions, Source
from saeguard_sae.formats.saelens_settings import CONFIG, Settings
from saeguard_sae.normalisation import Normalisation

SCALER = "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"

_KEY = "normalize_activations"
_SCALED, _WHITENED, _FACTOR = "expected_average_only_in", "covariance_whitening", "constant_scalar_rescale"
_PER_TOKEN = ("none", "layer_norm", "constant_norm_rescale")


@dataclass(frozen=True, slots=True)
class Whitening:
    """``z = (x - mean) @ matrix`` and back, in float64: ``mean`` [d_in], both matrices [d_in, d_in]."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """How an activation reaches the encoder; ``scale`` and ``whitening`` are to be folded into the weights."""

    normalisation: Normalisation = "none"
    scale: float = 1.0
    whitening: Whitening | None = None
    files: tuple[Path, ...] = ()
    """Those that it was read from."""
    used: frozenset[str] = field(default_factory=frozenset)
    """Names of the choices that it was taken from."""


def arrival(source: Source, settings: Settings, said: Conventions) -> Arrival:
    """What the config, the checkpoint's other files and the user say together.

    Raises:
        ValueError: a normalisation that is not supported, or one whose numbers are not known.
    """
    mode, who = _mode(source, settings)
    said.note("normalisation", mode, who)
    scaler = _Scaler(source.path)
    if mode == _SCALED:
        return _scaled(source, scaler, said)
    if mode == _WHITENED:
        return _whitened(scaler, said)
    scaler.must_be_idle(mode)
    if mode == _FACTOR:
        table = {"activation_normalization_factor": 1.0} | dict(settings.table)
        factor = files.number(table, "activation_normalization_factor", CONFIG)
        said.note("activation scale", factor, settings.source("activation_normalization_factor"))
        return Arrival(scale=_positive(factor, f"{CONFIG}: activation_normalization_factor"), files=scaler.files)
    return Arrival(normalisation=cast(Normalisation, mode), files=scaler.files)


def _mode(source: Source, settings: Settings) -> tuple[str, str]:
    """Its name, and who says so."""
    published = releases.at(source.origin.repo, source.origin.path) if source.origin else None
    if published is not None and published.normalisation is not None:
        return published.normalisation, releases.source()
    table = {_KEY: "none" if (value := settings.table.get(_KEY)) is None else value}
    allowed: tuple[str, ...] = (*_PER_TOKEN, _SCALED, _WHITENED)
    if settings.architecture == "temporal":
        allowed = ("none", _FACTOR)
    elif settings.architecture == "matching_pursuit":
        # Its encoder is its decoder, and cannot take a whitening into itself alone.
        allowed = (*_PER_TOKEN, _SCALED)
    elif settings.is_transcoder:
        # One factor could not say how both of the places that it connects are scaled.
        allowed = _PER_TOKEN
    return files.choice(table, _KEY, allowed, f"{CONFIG} ({settings.architecture})"), settings.source(_KEY)


class _Scaler:
    """``activation_scaler.json``, which SAELens writes beside its training checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.path, self.whitening = folder / SCALER, folder / WHITENING
        self._table: dict[str, Any] = {}
        if self.path.is_file():
            self._table = files.json_object(self.path)
            files.check_keys(self._table, ("scaling_factor", "has_whitening"), SCALER)
        self.factor = self._table.get("scaling_factor")
        self.files = (self.path,) if self._table else ()

    @property
    def has_whitening(self) -> bool:
        return files.flag(self._table, "has_whitening", False, SCALER)

    def must_be_idle(self, mode: str) -> None:
        """The checkpoint's scaler and its config must tell the same story."""
        if self.factor is not None or self.has_whitening:
            key = "scaling_factor" if self.factor is not None else "has_whitening"
            raise ValueError(f"{SCALER}: {key} is {self._table[key]!r}, but {CONFIG} says {_KEY} {mode!r}")


def _scaled(source: Source, scaler: _Scaler, said: Conventions) -> Arrival:
    if scaler.factor is not None:
        factor, who = files.number({"scaling_factor": scaler.factor}, "scaling_factor", SCALER), SCALER
    elif source.choices.scale is not None:
        factor, who = source.choices.scale, source.choices.scale_said_by
    else:
        raise ValueError(
            f"{CONFIG}: {_KEY} is {_SCALED}, but the factor is not in the files; give scale = sqrt(d_in) / mean |x|"
        )
    said.note("activation scale", factor, who)
    used = frozenset({"scale"}) if who == source.choices.scale_said_by else frozenset()
    return Arrival(scale=_positive(factor, "scale"), files=scaler.files, used=used)


def _whitened(scaler: _Scaler, said: Conventions) -> Arrival:
    if not scaler.whitening.is_file():
        raise ValueError(
            f"{CONFIG}: {_KEY} is {_WHITENED}, but {WHITENING} is not in the folder; SAELens writes it beside a "
            "checkpoint and folds it into the SAE when training ends"
        )
    tensors = files.safetensors(scaler.whitening)
    parts = [tensors.take(name, keep_dtype=True).to(torch.float64) for name in ("mean", "matrix", "inverse_matrix")]
    tensors.close()
    _check_square(parts)
    said.note("input whitening", "folded into the weights", WHITENING)
    return Arrival(whitening=Whitening(*parts), files=(*scaler.files, scaler.whitening))


def _check_square(parts: list[Tensor]) -> None:
    width = parts[0].numel()
    for name, part, wanted in zip(
        ("mean", "matrix", "inverse_matrix"), parts, ((width,), (width, width), (width, width)), strict=True
    ):
        if tuple(part.shape) != wanted:
            raise ValueError(f"{WHITENING}: {name} has shape {tuple(part.shape)}, expected {wanted}")


def _positive(factor: float, name: str) -> float:
    if not 0 < factor < float("inf"):
        raise ValueError(f"{name} must be above 0, got {factor}")
    return factor
