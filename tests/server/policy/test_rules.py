"""Rules of several policies on one feature: what is accepted pair by pair can be kept together, and is."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.types import Cap, Clamp, FeatureRef, Floor, Intervention, Scale, Scope, Zero
from saeguard_sae.edits import Affine
from saeguard_server.engine.protocol import CompiledEdit, Origin
from saeguard_server.policy.rules import Clash, clash_of, combine
from saeguard_server.policy.tighten import TokenSet, token_overlap

EDITS: list[Intervention] = [
    Zero("mid", 2),
    Clamp("mid", 2, 1.0),
    Cap("mid", 2, 1.0),
    Cap("mid", 2, 2.0),
    Floor("mid", 2, 0.5),
    Scale("mid", 2, 0.5),
    Scale("mid", 2, 0.25),
    Scale("mid", 2, 3.0),
]
SCOPES = [
    Scope(),
    Scope(phase="prompt"),
    Scope(phase="generated"),
    Scope(start=2),
    Scope(phase="prompt", start=0, end=2),
]
PROMPT, TOKENS = 4, 8


ENGINE: Any = SimpleNamespace(saes={"mid": SimpleNamespace(digest="d", site="here", writes=())})


def ready(number: int, edit: Intervention, scope: Scope, is_conditional: bool) -> CompiledEdit:
    condition: Any = SimpleNamespace(digest="when", is_trigger=False) if is_conditional else None
    return CompiledEdit(
        "mid", 2, edit.kind, Affine(*edit.affine(1.0)), 0, 0, False, origin=Origin(f"p{number}", "r"),
        scope=scope, condition=condition, field="rules[0]",
    )  # fmt: skip


rules = st.tuples(st.sampled_from(EDITS), st.sampled_from(SCOPES), st.sampled_from([False, False, False, True]))


def covers(edit: CompiledEdit, token: int) -> bool:
    first, last = edit.scope.positions(PROMPT)
    return first <= token and (last is None or token < last)


@settings(max_examples=120, deadline=None)
@given(st.lists(rules, min_size=2, max_size=4))
def test_pairs_decide_and_every_rule_is_kept(drawn: list[tuple[Intervention, Scope, bool]]) -> None:
    wanted = [ready(number, *one) for number, one in enumerate(drawn)]
    is_fine = not any(clash_of(one, other) for one, other in combinations(wanted, 2))
    try:
        found = combine(wanted, (), ENGINE)
    except Clash:
        assert not is_fine
        return
    for one, other in combinations(found.edits, 2):
        assert token_overlap(TokenSet.of(one), TokenSet.of(other)) == "apart"
    for (rule, (edit, *_)), token in (
        (pair, token) for pair in zip(wanted, drawn, strict=True) for token in range(TOKENS)
    ):
        if covers(rule, token):
            (made,) = (one for one in found.edits if covers(one, token))
            assert not TokenSet.of(made).condition or TokenSet.of(made) == TokenSet.of(rule)
            assert_kept(edit, made)


def assert_kept(rule: Intervention, made: CompiledEdit) -> None:
    values = np.linspace(0.0, 10.0, 41)
    alpha, beta, low, high = made.affine
    given = np.minimum(np.maximum(alpha * values + beta, low), high)
    match rule:
        case Cap(value=bound):
            assert (given <= bound).all()
        case Floor(value=bound):
            assert (given >= bound).all()
        case Scale(factor=factor) if not np.isfinite([low, high]).any():
            assert (given <= factor * values).all() if factor < 1 else (given >= factor * values).all()
        case Clamp(value=value):
            assert (given == value).all()
        case Zero():
            assert (given == 0).all()


def test_a_clash_names_both() -> None:
    pair = [ready(0, Zero("mid", 2), Scope(), False), ready(1, Clamp("mid", 2, 1.0), Scope(), False)]
    with pytest.raises(
        Clash, match="rule 'r' of policy 'p0' and rule 'r' of policy 'p1' cannot both be kept"
    ) as caught:
        combine(pair, (), ENGINE)
    assert {caught.value.first, caught.value.second} == set(pair)


def test_what_was_combined_knows_its_rules_and_is_the_strictest_ones() -> None:
    three = [ready(number, Cap("mid", 2, bound), Scope(), False) for number, bound in enumerate([3.0, 1.0, 2.0])]
    ((made, of),) = combine(three, (), ENGINE).by_feature[FeatureRef("mid", 2)]
    assert set(of) == set(three)
    assert made.affine.hi == 1.0
    assert made.origin.policy == "p1"
