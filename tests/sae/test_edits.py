"""The map of an edit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from saeguard_sae.edits import IDENTITY, Affine


def run(affine: Affine, f: float) -> float:
    return min(max(affine.alpha * f + affine.beta, affine.lo), affine.hi)


@given(f=st.floats(-1e6, 1e6))
def test_an_idle_cell_changes_nothing_exactly(f: float) -> None:
    assert run(Affine(), f) == f
    assert Affine() == IDENTITY
