"""What the check must find: what the settings say, else what an SAE's files state, with a margin.

The margins are wide. Files state numbers from other text, from contexts of another length, sometimes from another
model of the family, and tens of percent lie between such measurements. A wrong convention does not change them by
tens of percent: the wrong site, bias, normalisation or scale typically multiplies or divides L0 by more than 3, or
leaves as much unexplained as the mean would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt

from saeguard_sae.catalogue import Quality

L0_FACTOR = 3.0  # L0 may be this many times what is stated, or as many times less
FVU_FACTOR, FVU_MARGIN = 2.0, 0.1
"""FVU may be twice what is stated, or 0.1 more, whichever is more: small ones grow by the text's own strangeness."""
CE_FACTOR, CE_MARGIN = 3.0, 0.5
"""The rise in cross-entropy may be 3 times what is stated and 0.5 nats more: it depends most on the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckBounds:
    """None is no bound. Values that are not finite never pass."""

    min_l0: float | None = None
    max_l0: float | None = None
    max_fvu: float | None = None  # largest share of variance that may be left unexplained
    max_ce_increase: float | None = None  # largest rise of the model's cross-entropy, in nats per token
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


def bounds_from(stated: Quality | None, stated_l0: float | None, settings: CheckBounds) -> CheckBounds:
    """The settings' bounds, else what follows from ``stated`` (``quality.json``) or ``stated_l0`` (its own files)."""
    derived = _derived(stated or Quality(), stated_l0)
    # A bound of the settings takes the opposite one along where the two would contradict each other.
    if settings.min_l0 is not None and "max_l0" in derived and derived["max_l0"][0] < settings.min_l0:
        del derived["max_l0"]
    if settings.max_l0 is not None and "min_l0" in derived and derived["min_l0"][0] > settings.max_l0:
        del derived["min_l0"]
    own = {name: value for name in _NAMES if (value := getattr(settings, name)) is not None}
    values = {name: value for name, (value, _) in derived.items()} | own
    reasons = {name: why for name, (_, why) in derived.items() if name not in own}
    return CheckBounds(**values, stated={**settings.stated, **reasons})


def _derived(stated: Quality, stated_l0: float | None) -> dict[str, tuple[float, str]]:
    bounds: dict[str, tuple[float, str]] = {}
    l0 = stated.l0 if stated.l0 is not None else stated_l0
    if l0 is not None and l0 > 0:
        bounds["min_l0"] = l0 / L0_FACTOR, f"the {l0:.4g} that its files state, by {L0_FACTOR:g}"
        bounds["max_l0"] = l0 * L0_FACTOR, f"{L0_FACTOR:g} x the {l0:.4g} that its files state"
    if stated.fvu is not None and stated.fvu >= 0:
        value = max(stated.fvu * FVU_FACTOR, stated.fvu + FVU_MARGIN)
        by = f"{FVU_FACTOR:g} x" if value == stated.fvu * FVU_FACTOR else f"{FVU_MARGIN:g} more than"
        bounds["max_fvu"] = value, f"{by} the {stated.fvu:.4g} that its files state"
    if (rise := stated.ce_increase) is not None:
        why = f"{CE_FACTOR:g} x the {rise:.4g} that its files state, and {CE_MARGIN:g}"
        bounds["max_ce_increase"] = max(rise, 0.0) * CE_FACTOR + CE_MARGIN, why
    return bounds


def violations(measured: Quality, bounds: CheckBounds) -> list[str]:
    """What lies outside, in words with both numbers."""
    problems = [
        f"{label} is {value}, not a number that means anything"
        for name, label in _LABELS.items()
        if (value := getattr(measured, name)) is not None and not isfinite(value)
    ]
    rise = "the rise in cross-entropy with its reconstructions in place, in nats per token,"
    for bound, label, value in (
        ("min_l0", "L0", measured.l0),
        ("max_l0", "L0", measured.l0),
        ("max_fvu", "FVU", measured.fvu),
        ("max_ce_increase", rise, measured.ce_increase),
    ):
        limit, why = getattr(bounds, bound), bounds.stated.get(bound)
        if limit is None:
            continue
        if value is None:
            if why is None:  # a bound that somebody set must not be passed over
                problems.append(f"{bound} is set, but {label} cannot be measured of this SAE alone")
        elif isfinite(value) and (value < limit if bound == "min_l0" else value > limit):
            side, (number, other) = "below" if bound == "min_l0" else "above", _pair(value, limit)
            problems.append(f"{label} {number} is {side} {other} ({why or f'{bound} in the settings'})")
    return problems


_LABELS = {
    "l0": "L0",
    "fvu": "FVU",
    "ce_base": "the model's cross-entropy",
    "ce_spliced": "the cross-entropy with its reconstructions in place",
}


def _pair(value: float, limit: float) -> tuple[str, str]:
    """Both as people read them, with as many digits as it takes to tell them apart."""
    for digits in (4, 6, 9):
        if (left := f"{value:.{digits}g}") != (right := f"{limit:.{digits}g}"):
            return left, right
    return repr(value), repr(limit)
