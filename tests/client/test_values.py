"""Value objects: what they normalise, and what they refuse by the argument's name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard_client import Add, Cap, ChatMessage, Clamp, FeatureRef, Floor, Intervention, Scale, Scope, Zero


@pytest.mark.parametrize("make", [Zero, Scale, Clamp, Add, Cap, Floor])
@pytest.mark.parametrize(
    ("sae", "feature", "message"),
    [
        (4, 1, "sae: must be a string"),
        ("a", -1, "feature: must be 0 to 4294967295, got -1"),
        ("a", 2**32, "feature: must be 0 to"),
        ("a", 1.0, "feature: must be an integer"),
        ("a", True, "feature: must be an integer"),
        ("a", "1", "feature: must be an integer"),
    ],
)
def test_targets(make: Any, sae: Any, feature: Any, message: str) -> None:
    operand = () if make is Zero else (1.0,)
    with pytest.raises(ValueError, match=message):
        make(sae, feature, *operand)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clamp("a", 1, "6"), "value: must be a number"),  # type: ignore[arg-type]
        (lambda: Clamp("a", 1, True), "value: must be a number"),
        (lambda: Clamp("a", 1, 10**400), "value: must be a number"),
        (lambda: Scale("a", 1, None), "factor: must be a number"),  # type: ignore[arg-type]
        (lambda: Clamp("a", 1, 6.0, unit="sigma"), "unit: must be one of raw, max, unit_decoder"),  # type: ignore[arg-type]
        (lambda: Zero("a", 1, scope="all"), "scope: must be a Scope"),  # type: ignore[arg-type]
        (lambda: Scope(phase="later"), "phase: must be one of all, prompt, generated"),  # type: ignore[arg-type]
        (lambda: Scope(start=-1), "start: must be 0 to"),
        (lambda: Scope(end=1.5), "end: must be an integer"),  # type: ignore[arg-type]
        (lambda: Scope(include_special_tokens=1), "include_special_tokens: must be True or False"),  # type: ignore[arg-type]
        (lambda: ChatMessage("user", None), "content: must be a string"),  # type: ignore[arg-type]
        (lambda: FeatureRef("a", -1), "feature: must be 0 to"),
    ],
)
def test_meaningless_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_numpy_scalars_become_pythons() -> None:
    edit = Clamp("a", np.int64(3), np.float32(0.5))  # type: ignore[arg-type]
    assert (type(edit.feature), type(edit.value)) == (int, float)
    assert edit == Clamp("a", 3, 0.5)
    assert hash(edit) == hash(Clamp("a", 3, 0.5))


def test_what_the_server_judges_is_left_to_it() -> None:
    assert Clamp("", 1, float("nan")).sae == ""


def test_values_are_frozen() -> None:
    edit = Zero("a", 1)
    with pytest.raises(FrozenInstanceError):
        edit.feature = 2  # type: ignore[misc]
    assert isinstance(edit, Intervention)


@given(st.text(min_size=1).filter(lambda text: text.isprintable()), st.integers(0, 2**32 - 1))
def test_a_features_spelling_reads_back(sae: str, feature: int) -> None:
    assert FeatureRef.parse(str(FeatureRef(sae, feature))) == FeatureRef(sae, feature)


@pytest.mark.parametrize(
    "spelling", ["", "resid4", "resid4:", ":3", "resid4:-3", "resid4:x", "resid4:\u0663", "a:4294967296"]
)
def test_what_is_not_a_feature(spelling: str) -> None:
    with pytest.raises(ValueError, match=r"is not a feature|feature: must be"):
        FeatureRef.parse(spelling)
