"""What is given wins, what is stated follows with its margin, and nothing outside passes."""

from __future__ import annotations

from dataclasses import fields
from math import inf, isfinite, nan
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from saeguard_sae.catalogue import Quality
from saeguard_sae.check import CheckBounds, bounds_from, violations

NAMES = tuple(one.name for one in fields(CheckBounds) if one.name != "stated")
UPPER = {"max_l0": "l0", "max_fvu": "fvu", "max_ce_increase": "ce_increase"}

numbers = st.just(0.0) | st.floats(1e-6, 1e4)
perhaps = st.none() | numbers
qualities = st.builds(Quality, l0=perhaps, fvu=perhaps, ce_base=perhaps, ce_spliced=perhaps)


@st.composite
def bounds(draw: Any) -> CheckBounds:
    low, high = draw(perhaps), draw(perhaps)
    if low is not None and high is not None:
        low, high = sorted((low, high))
    rise = draw(st.none() | st.floats(-5.0, 50.0))
    return CheckBounds(min_l0=low, max_l0=high, max_fvu=draw(perhaps), max_ce_increase=rise)


def measured(**values: Any) -> Quality:
    known: dict[str, Any] = {
        "tokens": 500, "l0": 20.0, "fvu": 0.2, "ce_base": 3.0, "ce_spliced": 3.1, "dead_share": 0.1
    }  # fmt: skip
    return Quality(**known | values)


measurements = st.builds(
    measured, l0=numbers, fvu=perhaps, ce_base=st.floats(0.0, 20.0), ce_spliced=st.floats(0.0, 20.0)
)


@given(qualities, perhaps, bounds())
def test_what_is_given_wins(stated: Quality, l0: float | None, own: CheckBounds) -> None:
    found = bounds_from(stated, l0, own)
    for name in NAMES:
        if getattr(own, name) is not None:
            assert getattr(found, name) == getattr(own, name)
            assert name not in found.stated
        elif getattr(found, name) is not None:
            assert "that its files state" in found.stated[name]


@given(measurements, bounds())
def test_a_violation_is_what_lies_outside(found: Quality, own: CheckBounds) -> None:
    outside = {name for name, value in UPPER.items() if _beyond(getattr(found, value), getattr(own, name))}
    if own.min_l0 is not None and found.l0 < own.min_l0:
        outside.add("min_l0")
    said = violations(found, own)
    assert {name for name in NAMES if any(f"({name} in the settings)" in one for one in said)} == outside
    unmeasured = own.max_fvu is not None and found.fvu is None
    assert len(said) == len(outside) + unmeasured
    assert own.admits(found.l0, found.fvu) == (not outside & {"min_l0", "max_l0", "max_fvu"})


def _beyond(value: float | None, bound: float | None) -> bool:
    return value is not None and bound is not None and value > bound


@given(qualities, perhaps)
def test_what_is_stated_passes_its_own_bounds(stated: Quality, l0: float | None) -> None:
    found = bounds_from(stated, l0, CheckBounds())
    known = stated.l0 if stated.l0 is not None else l0
    same = measured(l0=known or 0.0, fvu=stated.fvu, ce_base=stated.ce_base, ce_spliced=stated.ce_spliced)
    assert violations(same, found) == []
    if known:
        assert found.middle_l0 == pytest.approx(known)


@given(measurements)
def test_nothing_known_is_no_bound(found: Quality) -> None:
    assert bounds_from(None, None, CheckBounds()) == bounds_from(Quality(), None, CheckBounds()) == CheckBounds()
    assert violations(found, CheckBounds()) == []


def test_the_margins() -> None:
    found = bounds_from(Quality(l0=20.4, fvu=0.15, ce_base=3.0, ce_spliced=3.2), 99.0, CheckBounds())
    assert found.min_l0 == pytest.approx(6.8)
    assert found.max_l0 == pytest.approx(61.2)
    assert found.max_fvu == pytest.approx(0.3)
    assert found.max_ce_increase == pytest.approx(1.1)
    assert bounds_from(Quality(fvu=0.3), None, CheckBounds()).max_fvu == pytest.approx(0.6)
    assert bounds_from(Quality(fvu=0.04), None, CheckBounds()).max_fvu == pytest.approx(0.14)
    assert bounds_from(Quality(ce_base=3.0, ce_spliced=2.9), None, CheckBounds()).max_ce_increase == 0.5
    assert bounds_from(None, 99.0, CheckBounds()).max_l0 == pytest.approx(297)
    assert bounds_from(Quality(fvu=0.1), 99.0, CheckBounds()).max_l0 == pytest.approx(297)


def test_the_words() -> None:
    stated = bounds_from(Quality(l0=20.4, fvu=0.05, ce_base=3.0, ce_spliced=3.2), None, CheckBounds())
    assert violations(measured(l0=412.0, fvu=0.4, ce_spliced=4.2), stated) == [
        "L0 412 is above 61.2 (3 x the 20.4 that its files state)",
        "FVU 0.4 is above 0.15 (0.1 more than the 0.05 that its files state)",
        "the rise in cross-entropy with its reconstructions in place, in nats per token, 1.2 is above 1.1 "
        "(3 x the 0.2 that its files state, and 0.5)",
    ]
    assert violations(measured(l0=2.0, fvu=0.1), stated) == ["L0 2 is below 6.8 (the 20.4 that its files state, by 3)"]
    twice = bounds_from(Quality(fvu=0.3), None, CheckBounds())
    assert violations(measured(fvu=7), twice) == ["FVU 7 is above 0.6 (2 x the 0.3 that its files state)"]
    close = violations(measured(l0=61.20004), CheckBounds(max_l0=61.20001))
    assert close == ["L0 61.20004 is above 61.20001 (max_l0 in the settings)"]


@given(st.floats(), st.floats(allow_nan=False, allow_infinity=False))
def test_both_numbers_are_told_apart(value: float, bound: float) -> None:
    assume(isfinite(value) and value > bound)
    (said,) = violations(measured(l0=value), CheckBounds(max_l0=bound))
    one, _, two = said.removeprefix("L0 ").removesuffix(" (max_l0 in the settings)").partition(" is above ")
    assert one != two


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("name", ["l0", "fvu", "ce_base", "ce_spliced"])
def test_what_is_no_number_never_passes(name: str, value: float) -> None:
    for own in (CheckBounds(), CheckBounds(max_l0=1e9, max_fvu=1e9, max_ce_increase=1e9)):
        (said,) = violations(measured(**{name: value}), own)
        assert said.endswith(f"is {value}, not a number that means anything")
    assert not CheckBounds().admits(nan, 0.1)
    assert not CheckBounds().admits(1.0, nan)


def test_a_bound_that_cannot_be_measured_is_not_passed_over() -> None:
    alone = measured(fvu=None, ce_base=None, ce_spliced=None)
    assert violations(alone, CheckBounds(max_fvu=0.5)) == [
        "max_fvu is set, but FVU cannot be measured of this SAE alone"
    ]
    assert len(violations(alone, CheckBounds(max_ce_increase=0.5))) == 1
    assert violations(alone, bounds_from(Quality(fvu=0.1, ce_base=1.0, ce_spliced=1.1), None, CheckBounds())) == []


def test_a_given_bound_drops_the_stated_one_that_contradicts_it() -> None:
    """Else nothing could pass."""
    stated = Quality(l0=20.0)
    assert bounds_from(stated, None, CheckBounds(min_l0=100.0)) == CheckBounds(min_l0=100.0)
    assert bounds_from(stated, None, CheckBounds(max_l0=2.0)) == CheckBounds(max_l0=2.0)
    assert bounds_from(stated, None, CheckBounds(min_l0=5.0)) == CheckBounds(min_l0=5.0, max_l0=60.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [nan, inf])
def test_bounds_are_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        CheckBounds(**{name: value})


def test_bounds_do_not_cross() -> None:
    with pytest.raises(ValueError, match="min_l0 60 is above max_l0 20"):
        CheckBounds(min_l0=60.0, max_l0=20.0)
