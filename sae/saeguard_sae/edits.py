"""The kinds of edit: each is a value, and one affine map with bounds of a feature's activation.

``f' = min(max(alpha * f + beta, lo), hi)``. Positions, rows, devices and dtypes are the table's job.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import ClassVar, Literal, NamedTuple, TypeAlias

Unit: TypeAlias = Literal["raw", "max", "unit_decoder"]
"""What a value is measured in: the SAE's own values, multiples of the feature's maximum, unit-norm decoder values."""

UNITS: tuple[Unit, ...] = ("raw", "max", "unit_decoder")


class Affine(NamedTuple):
    """Columns of one edit: ``f' = min(max(alpha * f + beta, lo), hi)``. The default changes nothing, exactly."""

    alpha: float = 1.0
    beta: float = 0.0
    lo: float = -inf
    hi: float = inf


IDENTITY = Affine()


@dataclass(frozen=True, slots=True)
class Zero:
    """Suppress the feature."""

    kind: ClassVar[str] = "zero"

    def affine(self, unit_scale: float) -> Affine:
        """``unit_scale`` raw values make one of the edit's units."""
        return Affine(alpha=0.0)


@dataclass(frozen=True, slots=True)
class _Valued:
    """An edit with a value in some unit."""

    value: float
    unit: Unit = "raw"

    def __post_init__(self) -> None:
        _finite("value", self.value)
        if self.unit not in UNITS:
            raise ValueError(f"unit: must be one of {', '.join(UNITS)}, got {self.unit!r}")


@dataclass(frozen=True, slots=True)
class Clamp(_Valued):
    """Pin the feature at ``value``, whatever the prompt says."""

    kind: ClassVar[str] = "clamp"

    def affine(self, unit_scale: float) -> Affine:
        """``unit_scale`` raw values make one of the edit's units."""
        return Affine(alpha=0.0, beta=self.value * unit_scale)


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply the feature by ``factor``."""

    factor: float
    kind: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        _finite("factor", self.factor)

    def affine(self, unit_scale: float) -> Affine:
        """``unit_scale`` raw values make one of the edit's units."""
        return Affine(alpha=self.factor)


@dataclass(frozen=True, slots=True)
class Add(_Valued):
    """Add ``value`` to the feature, the field's usual steering."""

    kind: ClassVar[str] = "add"

    def affine(self, unit_scale: float) -> Affine:
        """``unit_scale`` raw values make one of the edit's units."""
        return Affine(beta=self.value * unit_scale)


@dataclass(frozen=True, slots=True)
class Cap(_Valued):
    """Let the feature be at most ``value``."""

    kind: ClassVar[str] = "cap"

    def affine(self, unit_scale: float) -> Affine:
        """``unit_scale`` raw values make one of the edit's units."""
        return Affine(hi=self.value * unit_scale)


@dataclass(frozen=True, slots=True)
class Floor(_Valued):
    """Let the feature be at least ``value``."""

    kind: ClassVar[str] = "floor"

    def affine(self, unit_scale: float) -> Affine:
        """``unit_scale`` raw values make one of the edit's units."""
        return Affine(lo=self.value * unit_scale)


Edit: TypeAlias = Zero | Clamp | Scale | Add | Cap | Floor

KINDS: dict[str, type[Edit]] = {kind.kind: kind for kind in (Zero, Clamp, Scale, Add, Cap, Floor)}
"""Every kind by the name it has on the wire."""

FLOAT32_MAX = 3.4028234663852886e38


def _finite(name: str, value: float) -> None:
    if not isfinite(value) or abs(value) > FLOAT32_MAX:
        raise ValueError(f"{name}: must be finite in float32, got {value!r}")
