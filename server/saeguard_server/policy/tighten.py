"""Whether a request's edit would weaken what a policy enforces, and what both together come to. Pure, in raw units.

Each kind of edit makes a demand on the feature's value: a constant, a factor, a difference, or bounds. An edit is
accepted where one map is at least as tight as the rule and keeps the edit's demand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Literal, TypeAlias

from saeguard.types import Scope
from saeguard_sae.edits import FLOAT32_MAX, Affine
from saeguard_server.engine.protocol import CompiledEdit

Base: TypeAlias = Literal["free", "constant", "scale", "add"]
Relation: TypeAlias = Literal["apart", "same", "within", "across"]


@dataclass(frozen=True, slots=True)
class FeatureEffect:
    """What is done to a feature: ``value`` is its constant, factor or difference; then it is kept in bounds.

    A constant has no bounds.
    """

    base: Base = "free"
    value: float = 0.0
    low: float = -inf
    high: float = inf

    @classmethod
    def of(cls, kind: str, affine: Affine) -> FeatureEffect:
        """What an edit of that kind does. Zero, clamp to 0 and scale by 0 are the same."""
        match kind:
            case "zero" | "clamp":
                return cls("constant", affine.beta)
            case "scale" if affine.alpha == 0:
                return cls("constant", 0.0)
            case "scale":
                return cls("scale", affine.alpha, affine.lo, affine.hi)
            case "add":
                return cls("add", affine.beta, affine.lo, affine.hi)
            case "cap" | "floor":
                return cls(low=affine.lo, high=affine.hi)
        raise AssertionError(f"a kind of edit without a demand: {kind}")

    @property
    def affine(self) -> Affine:
        match self.base:
            case "free":
                return Affine(lo=self.low, hi=self.high)
            case "constant":
                return Affine(alpha=0.0, beta=self.value)
            case "scale":
                return Affine(alpha=self.value, lo=self.low, hi=self.high)
            case "add":
                return Affine(beta=self.value, lo=self.low, hi=self.high)

    @property
    def kind(self) -> str:
        """The kind that says best what it is; ``affine`` says exactly."""
        match self.base:
            case "free":
                return "cap" if self.high < inf else "floor"
            case "constant":
                return "clamp" if self.value else "zero"
            case base:
                return base

    @property
    def may_be_capped(self) -> bool:
        """Whether less of the feature is never weaker."""
        return self.base == "free" or (self.base == "scale" and 0 <= self.value <= 1) or self._adds(-1)

    @property
    def may_be_floored(self) -> bool:
        """Whether more of the feature is never weaker."""
        return self.base == "free" or (self.base == "scale" and self.value >= 1) or self._adds(1)

    def _adds(self, sign: int) -> bool:
        return self.base == "add" and self.value * sign > 0


NOTHING = FeatureEffect()


def combine_effects(enforced: FeatureEffect, requested: FeatureEffect) -> FeatureEffect | None:
    """The effect that is as tight as ``enforced`` and keeps the demand of ``requested``; None where there is none.

    Args:
        requested: of one edit. A factor or difference under enforced bounds is kept within them.
    """
    if enforced.base == "constant":
        return enforced if already_meets(enforced, requested) else None
    match requested.base:
        case "free":
            return _bounded(enforced, requested)
        case "constant":
            return _pinned(enforced, requested)
        case "scale" | "add":
            return _moved(enforced, requested)


def already_meets(enforced: FeatureEffect, requested: FeatureEffect) -> bool:
    """Whether ``enforced`` alone keeps the demand of ``requested``, whatever the feature's value."""
    low, high = (enforced.value,) * 2 if enforced.base == "constant" else (enforced.low, enforced.high)
    match requested.base:
        case "free":
            return requested.low <= low and high <= requested.high
        case "constant":
            return low == high == requested.value
        case "scale" | "add":
            return enforced == requested


def only_removes(enforced: FeatureEffect, tighter: FeatureEffect) -> bool:
    """Whether the feature always ends between zero and what ``enforced`` leaves of it."""
    before, after = enforced.affine, tighter.affine
    # Between these values both are linear and keep their sign.
    corners = {0.0, FLOAT32_MAX, -FLOAT32_MAX}
    for affine in (before, after):
        if affine.alpha:
            corners |= {(f - affine.beta) / affine.alpha for f in (0.0, affine.lo, affine.hi) if isfinite(f)}
    return all(min(0.0, before.of(f)) <= after.of(f) <= max(0.0, before.of(f)) for f in corners)


def strictness(effect: FeatureEffect) -> tuple[int, float]:
    """Rules are combined in this order: if they can be combined at all, they can in this one."""
    match effect.base:
        case "free":
            return 0, 0.0
        case "scale":
            return 1, abs(effect.value - 1)
        case "add":
            return 1, abs(effect.value)
        case "constant":
            return 2, 0.0


def _bounded(enforced: FeatureEffect, requested: FeatureEffect) -> FeatureEffect | None:
    # Between 0 and 1 a rule takes towards 0, and no further: a cap far below would push without a bound.
    if enforced.base == "scale" and enforced.value < 1 and requested.high < 0:
        return None
    if (requested.high < inf and not enforced.may_be_capped) or (requested.low > -inf and not enforced.may_be_floored):
        return None
    low, high = max(enforced.low, requested.low), min(enforced.high, requested.high)
    return replace(enforced, low=low, high=high) if low <= high else None


def _pinned(enforced: FeatureEffect, requested: FeatureEffect) -> FeatureEffect | None:
    is_within = enforced.low <= requested.value <= enforced.high
    is_tight = enforced.base == "free" or (
        enforced.base == "scale" and 0 <= enforced.value <= 1 and requested.value == 0
    )  # fmt: skip
    return requested if is_within and is_tight else None


def _moved(enforced: FeatureEffect, requested: FeatureEffect) -> FeatureEffect | None:
    if enforced.base == "free":
        return replace(requested, low=enforced.low, high=enforced.high)
    old, new = enforced.value, requested.value
    if enforced.base != requested.base:
        return None
    if enforced.base == "scale":
        is_tight = 0 <= new <= old <= 1 or new >= old >= 1 or new == old
    else:
        is_tight = new <= old < 0 or new >= old > 0 or new == old
    return replace(enforced, value=new) if is_tight else None


@dataclass(frozen=True, slots=True)
class TokenSet:
    """The tokens on which an edit is made: those of a scope, while a condition holds, from when a trigger fired."""

    scope: Scope
    condition: str = ""
    """Its digest; empty where the edit is made on all of the scope's tokens."""
    is_triggered: bool = False

    @classmethod
    def of(cls, edit: CompiledEdit) -> TokenSet:
        if edit.condition is None:
            return cls(edit.scope)
        return cls(edit.scope, edit.condition.digest, edit.condition.is_trigger)


def token_overlap(enforced: TokenSet, requested: TokenSet) -> Relation:
    """``apart``: no token is in both; ``same``: the same tokens; ``within``: all ``requested`` are always enforced."""
    if are_apart(enforced.scope, requested.scope):
        return "apart"
    if enforced == requested and not enforced.is_triggered:
        return "same"
    if not enforced.condition and contains(enforced.scope, requested.scope):
        return "within"
    return "across"


def are_apart(first: Scope, second: Scope) -> bool:
    """Whether no token of any prompt is in both; a prompt's last token is in both its phases."""
    return _ends_before(first, second.start) or _ends_before(second, first.start)


def contains(outer: Scope, inner: Scope) -> bool:
    """Whether every token of ``inner`` is in ``outer``, whatever the prompt."""
    return (
        outer.phase in ("all", inner.phase)
        and outer.start <= inner.start
        and (outer.end is None or (inner.end is not None and inner.end <= outer.end))
        and (outer.include_special_tokens or not inner.include_special_tokens)
    )


def _ends_before(scope: Scope, position: int) -> bool:
    return scope.end is not None and scope.end <= position
