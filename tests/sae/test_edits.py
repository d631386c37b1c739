"""Each kind of edit against its definition, written out again."""

from __future__ import annotations

from dataclasses import fields
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard_sae.edits import KINDS, Add, Affine, Cap, Clamp, Edit, Floor, Scale, Zero

numbers = st.floats(-1e6, 1e6)


def run(affine: Affine, f: float) -> float:
    return min(max(affine.alpha * f + affine.beta, affine.lo), affine.hi)


@given(f=numbers, v=numbers, unit=st.floats(0.01, 100))
def test_every_kind_is_what_its_name_says(f: float, v: float, unit: float) -> None:
    assert run(Zero().affine(unit), f) == 0
    assert run(Clamp(v).affine(unit), f) == v * unit
    assert run(Scale(v).affine(unit), f) == v * f
    assert run(Add(v).affine(unit), f) == f + v * unit
    assert run(Cap(v).affine(unit), f) == min(f, v * unit)
    assert run(Floor(v).affine(unit), f) == max(f, v * unit)


@given(f=numbers)
def test_an_idle_cell_changes_nothing_exactly(f: float) -> None:
    assert run(Affine(), f) == f


@pytest.mark.parametrize("bad", [nan, inf, -inf, 1e39, -1e300])
@pytest.mark.parametrize("kind", [Clamp, Add, Cap, Floor, Scale])
def test_values_that_float32_cannot_hold_are_refused_by_name(kind: type[Edit], bad: float) -> None:
    with pytest.raises(ValueError, match=r"^(value|factor): must be finite"):
        kind(bad)  # type: ignore[call-arg]


def test_unknown_units_are_refused() -> None:
    with pytest.raises(ValueError, match="unit: must be one of raw, max, unit_decoder"):
        Clamp(1.0, "percent")  # type: ignore[arg-type]


def test_kinds_are_listed_under_their_own_names() -> None:
    assert KINDS.keys() == {"zero", "clamp", "scale", "add", "cap", "floor"}
    assert [field.name for field in fields(Clamp)] == ["value", "unit"]
