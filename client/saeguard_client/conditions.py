"""When an edit or a trigger acts: conditions on features, and what a trigger does.

A condition is ``bias + sum of weight * feature``, over a window of tokens, compared with a threshold: a linear probe
on SAE features. The server decides it on every token, from values before any edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from saeguard_client import _checks
from saeguard_client.scopes import UNITS, Scope, Unit

Comparison: TypeAlias = Literal["above", "at_least", "below", "at_most"]
WindowKind: TypeAlias = Literal["this_token", "any_so_far", "maximum", "rolling_mean", "k_of_n"]
COMPARISONS: Final[tuple[Comparison, ...]] = get_args(Comparison)
WINDOWS: Final[tuple[WindowKind, ...]] = get_args(WindowKind)


@dataclass(frozen=True, slots=True)
class Term:
    """A feature and its weight in a condition's sum."""

    sae: str
    feature: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        _checks.text("sae", self.sae)
        object.__setattr__(self, "feature", _checks.whole("feature", self.feature))
        object.__setattr__(self, "weight", _checks.number("weight", self.weight))


@dataclass(frozen=True, slots=True)
class Window:
    """Which values of the sum are looked at, the present token's last.

    Attributes:
        kind: "this_token"; "any_so_far": whether one compared true, once and for all; "maximum": the largest so far;
            "rolling_mean" of the last ``tokens``; "k_of_n": whether ``k`` of the last ``tokens`` compared true.
        tokens: tokens in the condition's scope, up to 128.
        k: how many of them.
    """

    kind: WindowKind = "this_token"
    tokens: int = 1
    k: int = 1

    def __post_init__(self) -> None:
        _checks.choice("kind", self.kind, WINDOWS)
        object.__setattr__(self, "tokens", _checks.whole("tokens", self.tokens))
        object.__setattr__(self, "k", _checks.whole("k", self.k))


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A weighted sum of features, compared with a threshold.

    Attributes:
        terms: the features; ``Condition.on`` is shorter for one.
        comparison: "above", "at_least", "below" or "at_most" the threshold.
        release: once it holds, it goes on holding while the value compares true with this; None is the threshold.
        unit: of threshold and release; others than "raw" are for one feature with weight 1 and no bias.
        scope: tokens on which it is decided; others leave it as it is.
    """

    terms: tuple[Term, ...]
    threshold: float
    comparison: Comparison = "above"
    bias: float = 0.0
    release: float | None = None
    unit: Unit = "raw"
    window: Window = Window()
    scope: Scope | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        for index, term in enumerate(self.terms):
            if not isinstance(term, Term):
                raise ValueError(f"terms[{index}]: must be a Term, got {term!r}")
        for name in ("threshold", "bias", "release"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checks.number(name, getattr(self, name)))
        _checks.choice("comparison", self.comparison, COMPARISONS)
        _checks.choice("unit", self.unit, UNITS)
        if not isinstance(self.window, Window):
            raise ValueError(f"window: must be a Window, got {self.window!r}")
        if self.scope is not None and not isinstance(self.scope, Scope):
            raise ValueError(f"scope: must be a Scope, got {self.scope!r}")

    @classmethod
    def on(
        cls,
        sae: str,
        feature: int,
        threshold: float,
        *,
        comparison: Comparison = "above",
        release: float | None = None,
        unit: Unit = "raw",
        window: Window = Window(),
        scope: Scope | None = None,
    ) -> Condition:
        """A condition on one feature."""
        return cls(
            terms=(Term(sae, feature),),
            threshold=threshold,
            comparison=comparison,
            release=release,
            unit=unit,
            window=window,
            scope=scope,
        )


def check_when(when: object) -> None:
    """Raises ValueError for what is neither a Condition nor None."""
    if when is not None and not isinstance(when, Condition):
        raise ValueError(f"when: must be a Condition, got {when!r}")
