"""The edits a request can ask for, one class per kind, and the tokens they apply to.

``f`` is the feature's value on a token and ``f'`` the value it gets. The SAE's reconstruction error is kept, and every
edit is measured from the model's own activation.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Final

from saeguard_client import _checks
from saeguard_client.conditions import Condition, check_when
from saeguard_client.scopes import UNITS, Scope, Unit


@dataclass(frozen=True, slots=True)
class Intervention:
    """Base of every edit: one feature of one SAE, named as the catalogue names it.

    With ``when``, it is made only on tokens on which that condition holds.
    """

    kind: ClassVar[str] = ""
    sae: str
    feature: int
    _: KW_ONLY
    scope: Scope | None = None
    when: Condition | None = None

    def __post_init__(self) -> None:
        _check_target(self)


@dataclass(frozen=True, slots=True)
class _Valued(Intervention):
    """An edit with a value in ``unit``: "raw" (the SAE's own), "max" (multiples of the feature's maximum in the
    catalogue) or "unit_decoder" (feature values under unit-norm decoder rows, as on Neuronpedia)."""

    value: float
    _: KW_ONLY
    unit: Unit = "raw"

    def __post_init__(self) -> None:
        _check_target(self)
        object.__setattr__(self, "value", _checks.number("value", self.value))
        _checks.choice("unit", self.unit, UNITS)


@dataclass(frozen=True, slots=True)
class Zero(Intervention):
    """Suppress the feature: ``f' = 0``."""

    kind: ClassVar[str] = "zero"


@dataclass(frozen=True, slots=True)
class Clamp(_Valued):
    """Pin the feature, also where it was off: ``f' = value``."""

    kind: ClassVar[str] = "clamp"


@dataclass(frozen=True, slots=True)
class Scale(Intervention):
    """Amplify, weaken or invert: ``f' = factor * f``."""

    kind: ClassVar[str] = "scale"
    factor: float

    def __post_init__(self) -> None:
        _check_target(self)
        object.__setattr__(self, "factor", _checks.number("factor", self.factor))


@dataclass(frozen=True, slots=True)
class Add(_Valued):
    """Shift: ``f' = f + value``."""

    kind: ClassVar[str] = "add"


@dataclass(frozen=True, slots=True)
class Cap(_Valued):
    """Limit from above: ``f' = min(f, value)``."""

    kind: ClassVar[str] = "cap"


@dataclass(frozen=True, slots=True)
class Floor(_Valued):
    """Limit from below: ``f' = max(f, value)``."""

    kind: ClassVar[str] = "floor"


KINDS: Final[dict[str, type[Intervention]]] = {edit.kind: edit for edit in (Zero, Clamp, Scale, Add, Cap, Floor)}


def _check_target(edit: Intervention) -> None:
    _checks.text("sae", edit.sae)
    object.__setattr__(edit, "feature", _checks.whole("feature", edit.feature))
    if edit.scope is not None and not isinstance(edit.scope, Scope):
        raise ValueError(f"scope: must be a Scope, got {edit.scope!r}")
    check_when(edit.when)
