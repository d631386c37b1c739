"""The table of what a request may add to a rule: every pair of kinds, by what the maps do to values."""

from __future__ import annotations

from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.types import PHASES, Add, Cap, Clamp, Floor, Intervention, Phase, Scale, Scope, Zero
from saeguard_sae.edits import Affine
from saeguard_server.policy.tighten import (
    NOTHING,
    FeatureEffect,
    TokenSet,
    already_meets,
    combine_effects,
    only_removes,
    strictness,
    token_overlap,
)

VALUES = (-3.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 3.0)
EDITS: list[Intervention] = [
    Zero("mid", 2),
    *(kind("mid", 2, value) for kind in (Clamp, Scale, Add, Cap, Floor) for value in VALUES),
]
POSITIVE = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 61)])
GRID = np.concatenate([-POSITIVE[::-1], POSITIVE])


def effect(edit: Intervention) -> FeatureEffect:
    return FeatureEffect.of(edit.kind, Affine(*edit.affine(1.0)))


def mapped(affine: Affine, values: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(affine.alpha * values + affine.beta, affine.lo), affine.hi)


def constant(edit: Intervention) -> float | None:
    if isinstance(edit, Zero) or edit == Scale("mid", 2, 0.0):
        return 0.0
    return edit.value if isinstance(edit, Clamp) else None


def is_accepted(rule: Intervention, asked: Intervention) -> bool:  # noqa: C901
    """The table as it was agreed, case by case."""
    pinned, wanted = constant(rule), constant(asked)
    if pinned is not None:
        match asked:
            case Cap(value=value):
                return value >= pinned
            case Floor(value=value):
                return value <= pinned
        return wanted == pinned
    match rule:
        case Cap(value=bound):
            if wanted is not None:
                return wanted <= bound
            return asked.value <= bound if isinstance(asked, Floor) else True
        case Floor(value=bound):
            if wanted is not None:
                return wanted >= bound
            return asked.value >= bound if isinstance(asked, Cap) else True
        case Scale(factor=a):
            match asked:
                case Scale(factor=b) if wanted is None:
                    return 0 <= b <= a <= 1 or b >= a >= 1 or b == a
                case Cap(value=value):
                    return a == 1 or (0 <= a < 1 and value >= 0)
                case Floor():
                    return a >= 1
            return wanted == 0 and 0 <= a <= 1
        case Add(value=v):
            match asked:
                case Add(value=w):
                    return w <= v < 0 or w >= v > 0 or w == v
                case Cap():
                    return v < 0
                case Floor():
                    return v > 0
            return False
    raise AssertionError(rule)


def is_tight(rule: Intervention, result: Affine) -> bool:
    """Whether nothing that the result gives is weaker than what the rule gives."""
    given, mine = mapped(result, GRID), mapped(Affine(*rule.affine(1.0)), GRID)
    match rule:
        case Cap(value=bound):
            return bool((given <= bound).all())
        case Floor(value=bound):
            return bool((given >= bound).all())
        case Scale(factor=a) if 0 < a < 1:
            return bool((given <= mine)[GRID >= 0].all())
        case Scale(factor=a) if a > 1:
            return bool((given >= mine)[GRID >= 0].all())
        case Add(value=v) if v < 0:
            return bool((given <= mine).all())
        case Add(value=v) if v > 0:
            return bool((given >= mine).all())
        case Scale(factor=1.0):
            return True
    return bool((given == mine).all())


def keeps(asked: Intervention, result: Affine, within: tuple[float, float] = (-inf, inf)) -> bool:
    """Whether the result does what was asked, a factor or difference within a rule's bounds."""
    given = mapped(result, GRID)
    match asked:
        case Cap(value=value):
            return bool((given <= value).all())
        case Floor(value=value):
            return bool((given >= value).all())
    return bool((given == np.clip(mapped(Affine(*asked.affine(1.0)), GRID), *within)).all())


@pytest.mark.parametrize("rule", EDITS, ids=str)
def test_every_pair_of_kinds(rule: Intervention) -> None:
    for asked in EDITS:
        found = combine_effects(effect(rule), effect(asked))
        assert (found is not None) == is_accepted(rule, asked), asked
        if found is None:
            continue
        is_bound = isinstance(rule, Cap | Floor)
        within = (found.low, found.high) if is_bound and isinstance(asked, Scale | Add) else (-inf, inf)
        assert is_tight(rule, found.affine), asked
        assert keeps(asked, found.affine, within), asked


def test_what_is_met_already_is_exactly_what_changes_nothing_in_the_result() -> None:
    for rule, asked in product(EDITS, EDITS):
        if already_meets(effect(rule), effect(asked)):
            assert keeps(asked, Affine(*rule.affine(1.0))), (rule, asked)
            assert combine_effects(effect(rule), effect(asked)) == effect(rule), (rule, asked)


EXAMPLES: list[tuple[Intervention, Intervention, Affine | None]] = [
    (Zero("mid", 2), Clamp("mid", 2, 3.0), None),
    (Zero("mid", 2), Cap("mid", 2, 3.0), Affine(alpha=0.0)),
    (Cap("mid", 2, 2.0), Cap("mid", 2, 1.0), Affine(hi=1.0)),
    (Cap("mid", 2, 1.0), Cap("mid", 2, 2.0), Affine(hi=1.0)),
    (Cap("mid", 2, 2.0), Floor("mid", 2, 0.5), Affine(lo=0.5, hi=2.0)),
    (Cap("mid", 2, 2.0), Zero("mid", 2), Affine(alpha=0.0)),
    (Cap("mid", 2, 2.0), Clamp("mid", 2, 3.0), None),
    (Cap("mid", 2, 2.0), Scale("mid", 2, 3.0), Affine(alpha=3.0, hi=2.0)),
    (Floor("mid", 2, 2.0), Add("mid", 2, -1.0), Affine(beta=-1.0, lo=2.0)),
    (Scale("mid", 2, 0.5), Scale("mid", 2, 0.2), Affine(alpha=0.2)),
    (Scale("mid", 2, 0.5), Scale("mid", 2, 0.8), None),
    (Scale("mid", 2, 0.5), Scale("mid", 2, -1.0), None),
    (Scale("mid", 2, 0.5), Zero("mid", 2), Affine(alpha=0.0)),
    (Scale("mid", 2, 0.5), Cap("mid", 2, 1.0), Affine(alpha=0.5, hi=1.0)),
    (Scale("mid", 2, 2.0), Floor("mid", 2, 1.0), Affine(alpha=2.0, lo=1.0)),
    (Scale("mid", 2, -1.0), Cap("mid", 2, 1.0), None),
    (Add("mid", 2, -1.0), Add("mid", 2, -2.0), Affine(beta=-2.0)),
    (Add("mid", 2, -1.0), Add("mid", 2, 2.0), None),
    (Add("mid", 2, -1.0), Cap("mid", 2, 1.0), Affine(beta=-1.0, hi=1.0)),
    (Add("mid", 2, -1.0), Zero("mid", 2), None),
]


@pytest.mark.parametrize(("rule", "asked", "result"), EXAMPLES, ids=str)
def test_examples(rule: Intervention, asked: Intervention, result: Affine | None) -> None:
    found = combine_effects(effect(rule), effect(asked))
    assert (None if found is None else found.affine) == result


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(EDITS), min_size=2, max_size=4), st.randoms())
def test_several_rules_hold_together_exactly_if_each_two_do_and_in_any_order_if_in_one(
    rules: list[Intervention], random
) -> None:
    def folded(ordered: list[Intervention]) -> FeatureEffect | None:
        total: FeatureEffect | None = NOTHING
        for one in ordered:
            total = None if total is None else combine_effects(total, effect(one))
        return total

    by_strictness = sorted(rules, key=lambda one: strictness(effect(one)))
    found = folded(by_strictness)
    pairs = all(
        combine_effects(effect(one), effect(two)) or combine_effects(effect(two), effect(one))
        for index, one in enumerate(rules)
        for two in rules[:index]
    )
    assert (found is not None) == pairs
    shuffled = folded(random.sample(rules, len(rules)))
    if shuffled is not None:
        assert found is not None
    if found is not None:
        # A factor on top of bounds is kept within them; so what each rule demands is what `keeps` allows for.
        bounds = [one for one in rules if isinstance(one, Cap | Floor)]
        assert all(is_tight(one, found.affine) for one in bounds)
        if not bounds:
            assert all(is_tight(one, found.affine) for one in rules)


def _scope(phase: Phase, start: int, length: int | None, special: bool) -> Scope:
    return Scope(
        phase=phase, start=start, end=None if length is None else start + length, include_special_tokens=special
    )


scopes = st.builds(_scope, st.sampled_from(PHASES), st.integers(0, 8), st.none() | st.integers(1, 8), st.booleans())


def tokens(scope: Scope, prompt: int) -> set[tuple[int, bool]]:
    """Positions a scope holds, each as a special token and as another one."""
    first, last = scope.positions(prompt)
    found = range(first, min(24, 24 if last is None else last))
    return {(at, special) for at in found for special in (False, True) if scope.include_special_tokens or not special}


@settings(max_examples=150, deadline=None)
@given(scopes, scopes)
def test_how_two_scopes_lie(rule: Scope, asked: Scope) -> None:
    found = token_overlap(TokenSet(rule), TokenSet(asked))
    held = [(tokens(rule, prompt), tokens(asked, prompt)) for prompt in range(1, 24)]
    match found:
        case "apart":
            assert not any(one & other for one, other in held)
        case "same":
            assert rule == asked
        case "within":
            assert all(other <= one for one, other in held)
        case "across":
            # Not exact where phases differ: a prompt has at least one token, and that is not made use of.
            assert rule.phase != asked.phase or any(not other <= one for one, other in held)


def test_conditions_hide_what_is_enforced() -> None:
    everywhere, sometimes, fired = TokenSet(Scope()), TokenSet(Scope(), "when"), TokenSet(Scope(), "trigger", True)
    assert token_overlap(sometimes, sometimes) == "same"
    assert token_overlap(everywhere, sometimes) == token_overlap(everywhere, fired) == "within"
    for enforced, asked in [(sometimes, everywhere), (fired, everywhere), (fired, fired), (sometimes, fired)]:
        assert token_overlap(enforced, asked) == "across"
    assert token_overlap(TokenSet(Scope(), "another"), sometimes) == "across"


def test_what_only_removes() -> None:
    """Of what the table allows: the rest pushes the stream as far as a caller likes."""
    answers = set()
    for rule, asked in product(map(effect, EDITS), repeat=2):
        tighter = combine_effects(rule, asked)
        if tighter is not None:
            before, after = mapped(rule.affine, GRID), mapped(tighter.affine, GRID)
            removes = bool(((np.minimum(before, 0) <= after) & (after <= np.maximum(before, 0))).all())
            assert only_removes(rule, tighter) == removes, (rule, asked)
            answers.add(removes)
    assert answers == {True, False}
    assert only_removes(effect(Cap("mid", 2, 2.0)), effect(Zero("mid", 2)))
    assert not only_removes(effect(Floor("mid", 2, 1.0)), effect(Clamp("mid", 2, 1e6)))
