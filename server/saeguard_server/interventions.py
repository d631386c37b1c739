"""What can be done to features, and when: edits with scopes, conditions, triggers; valid once they exist."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal, TypeAlias, get_args

from saeguard_sae.edits import FLOAT32_MAX, UNITS, Affine, Edit, Unit

Phase: TypeAlias = Literal["all", "prompt", "generated"]
PHASES: tuple[Phase, ...] = get_args(Phase)

Comparison: TypeAlias = Literal["above", "at_least", "below", "at_most"]
COMPARISONS: tuple[Comparison, ...] = get_args(Comparison)

WindowKind: TypeAlias = Literal["this_token", "any_so_far", "maximum", "rolling_mean", "k_of_n"]
WINDOWS: tuple[WindowKind, ...] = get_args(WindowKind)

MAX_WINDOW = 128
"""Tokens that a condition can look back over."""
MAX_TERMS = 4096
"""Features in one condition."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The tokens something applies to: a phase, positions ``[start, end)``, and special tokens only when asked."""

    phase: Phase = "all"
    start: int = 0
    end: int | None = None
    include_special_tokens: bool = False

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase: must be one of {', '.join(PHASES)}, got {self.phase!r}")
        if self.start < 0:
            raise ValueError(f"start: must be at least 0, got {self.start}")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end: must be above start ({self.start}), got {self.end}")

    def positions(self, prompt_tokens: int) -> tuple[int, int | None]:
        """``[first, last)`` position that the scope selects for a prompt of that length; None is no end."""
        first, last = self.start, self.end
        if self.phase == "generated":
            first = max(first, prompt_tokens)
        if self.phase == "prompt":
            last = prompt_tokens if last is None else min(last, prompt_tokens)
        return first, last


@dataclass(frozen=True, slots=True)
class FeatureRef:
    """One feature of a named SAE."""

    sae: str
    feature: int

    def __post_init__(self) -> None:
        if not self.sae:
            raise ValueError("sae: must not be empty")
        if self.feature < 0:
            raise ValueError(f"feature: must be at least 0, got {self.feature}")


@dataclass(frozen=True, slots=True)
class Term:
    """A feature and its weight in a condition's sum."""

    feature: FeatureRef
    weight: float = 1.0

    def __post_init__(self) -> None:
        _finite("weight", self.weight)
        if self.weight == 0:
            raise ValueError("weight: must not be 0")


@dataclass(frozen=True, slots=True)
class Window:
    """Which values of the sum a condition looks at, the present token's last.

    ``this_token``: its value; ``any_so_far``: whether one compared true, once and for all; ``maximum``: the largest so
    far; ``rolling_mean``: the mean of the last ``tokens``, of fewer while there are fewer; ``k_of_n``: whether at least
    ``k`` of the last ``tokens`` compared true.
    """

    kind: WindowKind = "this_token"
    tokens: int = 1
    k: int = 1

    def __post_init__(self) -> None:
        if self.kind not in WINDOWS:
            raise ValueError(f"kind: must be one of {', '.join(WINDOWS)}, got {self.kind!r}")
        if not 1 <= self.tokens <= MAX_WINDOW:
            raise ValueError(f"tokens: must be 1 to {MAX_WINDOW}, got {self.tokens}")
        if not 1 <= self.k <= self.tokens:
            raise ValueError(f"k: must be 1 to {self.tokens}, the window's tokens, got {self.k}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """``bias + sum of weight * feature`` over a window, compared with a threshold: a linear probe on SAE features.

    It is decided on every token in ``scope`` while the model reads it, from values before any edit of the SAE's site.
    Once it holds, it goes on holding until the value no longer compares true with ``release``; without one, with
    ``threshold``. Tokens out of scope leave it as it is.
    """

    terms: tuple[Term, ...]
    threshold: float
    comparison: Comparison = "above"
    bias: float = 0.0
    release: float | None = None
    unit: Unit = "raw"
    """Of ``threshold`` and ``release``; others than raw are for a condition on one feature alone."""
    window: Window = Window()
    scope: Scope = Scope()

    def __post_init__(self) -> None:
        if not 1 <= len(self.terms) <= MAX_TERMS:
            raise ValueError(f"terms: must be 1 to {MAX_TERMS}, got {len(self.terms)}")
        if len({one.feature for one in self.terms}) != len(self.terms):
            raise ValueError("terms: a feature is named twice")
        if self.comparison not in COMPARISONS:
            raise ValueError(f"comparison: must be one of {', '.join(COMPARISONS)}, got {self.comparison!r}")
        if self.unit not in UNITS:
            raise ValueError(f"unit: must be one of {', '.join(UNITS)}, got {self.unit!r}")
        if self.unit != "raw" and (len(self.terms) > 1 or self.terms[0].weight != 1 or self.bias):
            raise ValueError(f"unit: {self.unit} is for one feature with weight 1 and no bias")
        _finite("threshold", self.threshold)
        _finite("bias", self.bias)
        if self.release is not None:
            self._check_release(self.release)

    def _check_release(self, release: float) -> None:
        _finite("release", release)
        is_rising = self.comparison in ("above", "at_least")
        if (release > self.threshold) if is_rising else (release < self.threshold):
            allowed = "at most" if is_rising else "at least"
            raise ValueError(f"release: must be {allowed} the threshold, {self.threshold:g}, got {release:g}")
        if self.window.kind in ("any_so_far", "k_of_n"):
            raise ValueError(f"release: a condition over {self.window.kind} has none")


@dataclass(frozen=True, slots=True)
class Intervention:
    """One edit of one feature, and where it applies; with ``when``, only on tokens on which that holds."""

    target: FeatureRef
    edit: Edit
    scope: Scope = Scope()
    when: Condition | None = None


@dataclass(frozen=True, slots=True)
class Flag:
    """Only count that it fired."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the generation: the token that fired, and anything after it, is never sent."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Make these edits from the token that fired on."""

    interventions: tuple[Intervention, ...]

    def __post_init__(self) -> None:
        if not self.interventions:
            raise ValueError("interventions: must not be empty")
        for index, one in enumerate(self.interventions):
            if one.when is not None:
                raise ValueError(f"interventions[{index}].when: the trigger's own condition decides")


Action: TypeAlias = Flag | Stop | Apply


@dataclass(frozen=True, slots=True)
class Trigger:
    """What happens when a condition holds for the first time. ``name`` is what receipts and replies call it."""

    name: str
    when: Condition
    action: Action = Flag()

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: must not be empty")


@dataclass(frozen=True, slots=True)
class Origin:
    """Who wants an edit or guard: a policy's rule, or the request itself where ``policy`` is empty."""

    policy: str = ""
    rule: str = ""
    """The rule's or trigger's name."""


OWN = Origin()
"""The request's own interventions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An intervention that shall be made on one request, and who wants it."""

    intervention: Intervention
    field: str
    """How refusals name it, such as ``interventions[2]``."""
    affine: Affine | None = None
    """What is done instead of the intervention's edit, in raw units: an edit tightened by another."""
    origin: Origin = OWN
    is_shadow: bool = False
    """Counted as if it were made, and not made."""
    is_limited: bool = True
    """Whether the request's ``max_relative_edit`` may shorten it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedTrigger:
    """A trigger that shall watch one request; ``is_shadow`` and ``is_limited`` are its edits' too."""

    trigger: Trigger
    field: str
    """How refusals name it, such as ``triggers[2]``."""
    origin: Origin = OWN
    is_shadow: bool = False
    is_limited: bool = True


def check_one_edit_per_feature(interventions: tuple[Intervention, ...]) -> None:
    """Two edits of one feature would each measure from the original value: refused.

    Raises:
        ValueError: the message begins with the second one's field.
    """
    seen: dict[FeatureRef, int] = {}
    for index, one in enumerate(interventions):
        first = seen.setdefault(one.target, index)
        if first != index:
            where = f"feature {one.target.feature} of {one.target.sae!r}"
            raise ValueError(f"interventions[{index}].feature: {where} is already edited by interventions[{first}]")


def _finite(name: str, value: float) -> None:
    if not isfinite(value) or abs(value) > FLOAT32_MAX:
        raise ValueError(f"{name}: must be finite in float32, got {value!r}")
