"""What the check must find: what the settings say, else what an SAE's files state, with a margin.

The margins are wide. Files state numbers from other text, from contexts of another length, sometimes from another
model of the family, and tens of percent lie between such measurements. A wrong convention does not change them by
tens of percent: the wrong site, bias, normalisation or scale typically multiplies or divides L0 by more than 3, or
leaves as much unexplained as the mean would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import NamedTuple

from saeguard_sae.catalogue import Quality
from saeguard_sae.check.measure import Measured

L0_FACTOR = 3.0
"""L0 may be this many times what is stated, or as many times less."""
FVU_FACTOR, FVU_MARGIN = 2.0, 0.1
"""FVU may be twice what is stated, or 0.1 more, whichever is more: small ones grow by the text's own strangeness."""
CE_FACTOR, CE_MARGIN = 3.0, 0.5
"""The rise in cross-entropy may be 3 times what is stated and 0.5 nats more: it depends most on the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """None is no bound. Values that are not finite never pass."""

    min_l0: float | None = None
    """Least features that fire on a token, mean."""
    max_l0: float | None = None
    """Most features that fire on a token, mean."""
    max_fvu: float | None = None
    """Largest share of variance that may be left unexplained."""
    max_ce_increase: float | None = None
    """Largest rise of the model's cross-entropy, in nats per token."""
    stated: Mapping[str, str] = field(default_factory=dict, compare=False)
    """How the bounds of these names follow from what the files state; the settings give those not in it."""

    def __post_init__(self) -> None:
        for name in _NAMES:
            value = getattr(self, name)
            if value is not None and not isfinite(value):
                raise ValueError(f"{name} must be a number, got {value}")
        if self.min_l0 is not None and self.max_l0 is not None and self.min_l0 > self.max_l0:
            raise ValueError(f"min_l0 {self.min_l0:g} is above max_l0 {self.max_l0:g}")

    @property
    def middle_l0(self) -> float | None:
        """What L0 is expected to be: as many times above the least as below the most, which is what files state."""
        if not self.min_l0 or not self.max_l0:
            return None
        return sqrt(self.min_l0) * sqrt(self.max_l0)

    def admits(self, l0: float, fvu: float | None) -> bool:
        """Whether these lie inside; an FVU that was not measured does."""
        numbers = [l0] if fvu is None else [l0, fvu]
        low, high = self.min_l0, self.max_l0
        within = (low is None or l0 >= low) and (high is None or l0 <= high)
        return all(map(isfinite, numbers)) and within and (fvu is None or self.max_fvu is None or fvu <= self.max_fvu)


_NAMES = ("min_l0", "max_l0", "max_fvu", "max_ce_increase")


class _Derived(NamedTuple):
    value: float
    why: str


def bounds_from(stated: Quality | None, stated_l0: float | None, given: Bounds) -> Bounds:
    """The bounds that are given; for each that is not, what follows from what is stated.

    Args:
        stated: what ``quality.json`` beside the weights says.
        stated_l0: what the SAE's own files say, where that does not.
        given: what the settings say.
    """
    derived = _derived(stated or Quality(), stated_l0)
    # A bound that is given takes the opposite one along where the two would contradict each other.
    if given.min_l0 is not None and "max_l0" in derived and derived["max_l0"].value < given.min_l0:
        del derived["max_l0"]
    if given.max_l0 is not None and "min_l0" in derived and derived["min_l0"].value > given.max_l0:
        del derived["min_l0"]
    own = {name: value for name in _NAMES if (value := getattr(given, name)) is not None}
    rest = {name: one for name, one in derived.items() if name not in own}
    reasons = {**given.stated, **{name: one.why for name, one in rest.items()}}
    return Bounds(**own, **{name: one.value for name, one in rest.items()}, stated=reasons)


def _derived(stated: Quality, stated_l0: float | None) -> dict[str, _Derived]:
    found: dict[str, _Derived] = {}
    l0 = stated.l0 if stated.l0 is not None else stated_l0
    if l0 is not None and l0 > 0:
        found["min_l0"] = _Derived(l0 / L0_FACTOR, f"the {_said(l0)} that its files state, by {L0_FACTOR:g}")
        found["max_l0"] = _Derived(l0 * L0_FACTOR, f"{L0_FACTOR:g} x the {_said(l0)} that its files state")
    if stated.fvu is not None and stated.fvu >= 0:
        value = max(stated.fvu * FVU_FACTOR, stated.fvu + FVU_MARGIN)
        by = f"{FVU_FACTOR:g} x" if value == stated.fvu * FVU_FACTOR else f"{FVU_MARGIN:g} more than"
        found["max_fvu"] = _Derived(value, f"{by} the {_said(stated.fvu)} that its files state")
    if stated.ce_base is not None and stated.ce_spliced is not None:
        rise = stated.ce_spliced - stated.ce_base
        why = f"{CE_FACTOR:g} x the {_said(rise)} that its files state, and {CE_MARGIN:g}"
        found["max_ce_increase"] = _Derived(max(rise, 0.0) * CE_FACTOR + CE_MARGIN, why)
    return found


class _Limit(NamedTuple):
    """One bound beside what it is about."""

    bound: str
    label: str
    value: float | None
    side: str

    def breaks(self, limit: float) -> bool:
        assert self.value is not None, "measured"
        return self.value > limit if self.side == "above" else self.value < limit


def violations(measured: Measured, bounds: Bounds) -> list[str]:
    """What lies outside, in words with both numbers."""
    found = [f"{label} is {value}, not a number that means anything" for label, value in _senseless(measured)]
    for one in _limits(measured):
        limit, why = getattr(bounds, one.bound), bounds.stated.get(one.bound)
        if limit is None:
            continue
        if one.value is None:
            if why is None:  # a bound that somebody set must not be passed over
                found.append(f"{one.bound} is set, but {one.label} cannot be measured of this SAE alone")
        elif isfinite(one.value) and one.breaks(limit):
            value, bound = _pair(one.value, limit)
            found.append(f"{one.label} {value} is {one.side} {bound} ({why or f'{one.bound} in the settings'})")
    return found


def _limits(measured: Measured) -> Iterator[_Limit]:
    rise = "the rise in cross-entropy with its reconstructions in place, in nats per token,"
    yield _Limit("min_l0", "L0", measured.l0, "below")
    yield _Limit("max_l0", "L0", measured.l0, "above")
    yield _Limit("max_fvu", "FVU", measured.fvu, "above")
    yield _Limit("max_ce_increase", rise, measured.ce_increase, "above")


def _senseless(measured: Measured) -> Iterator[tuple[str, float]]:
    labels = {
        "l0": "L0",
        "fvu": "FVU",
        "ce_base": "the model's cross-entropy",
        "ce_spliced": "the cross-entropy with its reconstructions in place",
    }
    for name, label in labels.items():
        value = getattr(measured, name)
        if value is not None and not isfinite(value):
            yield label, value


def _said(value: float) -> str:
    return f"{value:.4g}"


def _pair(value: float, limit: float) -> tuple[str, str]:
    """Both as people read them, with as many digits as it takes to tell them apart."""
    for digits in (4, 6, 9):
        if (one := f"{value:.{digits}g}") != (two := f"{limit:.{digits}g}"):
            return one, two
    return repr(value), repr(limit)
