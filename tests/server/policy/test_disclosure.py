"""What a caller is told: features that policies withhold, and what receipts say to whom."""

from __future__ import annotations

from array import array
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard.requests import ActivationRequest, FeatureSelection, GenerateRequest, ThresholdSelection, TopKSelection
from saeguard.results import (
    ActivationPart,
    Completion,
    InterventionReceipt,
    PolicyFacts,
    Receipt,
    StoppedBy,
    Timings,
    TokenText,
    TriggerReceipt,
    Usage,
)
from saeguard.types import Apply, Condition, FeatureRef, Term, Trigger, Zero
from saeguard_sae.edits import Affine
from saeguard_server.caller import Caller, Role
from saeguard_server.engine.protocol import CompiledCondition, CompiledEdit, Origin, Steering
from saeguard_server.errors import PolicyRefusal
from saeguard_server.policy.disclosure import (
    Disclosure,
    Withheld,
    check_withheld,
    widened,
    withheld_from,
    without_withheld,
)
from saeguard_server.policy.model import PolicyLimits, Rollout, Target
from support.policy_shapes import NOW, policy, rule
from support.resolving import BOT, READER, InForce

SECRET = FeatureRef("mid", 3)
LIMITS = PolicyLimits(withheld_features=(SECRET,))


def when(*numbers: int) -> Condition:
    return Condition(terms=tuple(Term("mid", number) for number in numbers), threshold=1.0)


def test_a_feature_is_withheld_from_those_at_whom_the_policy_is_aimed(in_force: InForce) -> None:
    snapshot = in_force(policy("a", limits=LIMITS, target=Target(callers=("bot",))))
    assert withheld_from(BOT, snapshot, NOW) == Withheld((("a", frozenset({SECRET})),))
    assert withheld_from(replace(BOT, name="human"), snapshot, NOW) == Withheld()
    assert withheld_from(READER, snapshot, NOW) == Withheld()
    assert withheld_from(Caller("bot", frozenset({Role.ADMIN})), snapshot, NOW) == Withheld()


def test_the_same_weights_under_another_name_are_withheld_too(served: Any, in_force: InForce) -> None:
    served.saes = {**served.saes, "alias": replace(served.saes["mid"], name="alias")}
    withheld = withheld_from(BOT, in_force(policy("a", limits=LIMITS)), NOW)
    assert withheld.of_sae("alias") == withheld.of_sae("mid") == (3,)
    assert all(withheld.of_sae(name) == () for name in served.saes.keys() - {"alias", "mid"})


@pytest.mark.parametrize(
    ("more", "is_withheld"),
    [
        ({"mode": "shadow"}, False),
        ({"mode": "off"}, False),
        ({"rollout": Rollout(share=0.0)}, True),
        ({"rollout": Rollout(share=0.5, by="conversation")}, True),
        ({"expires": NOW}, False),
        ({"expires": NOW + timedelta(seconds=1)}, True),
        ({"target": Target(models=("other",))}, False),
    ],
)
def test_while_the_policy_is_enforced_whatever_its_share(
    more: dict[str, Any], is_withheld: bool, in_force: InForce
) -> None:
    assert bool(withheld_from(BOT, in_force(policy("a", limits=LIMITS, **more)), NOW).by_policy) == is_withheld


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("watch[1]", GenerateRequest(input="x", watch=(FeatureRef("mid", 1), SECRET))),
        ("interventions[0]", GenerateRequest(input="x", interventions=(Zero("mid", 3),))),
        (
            "interventions[0].when.terms[1]",
            GenerateRequest(input="x", interventions=(Zero("mid", 1, when=when(2, 3)),)),
        ),
        ("triggers[0].when.terms[0]", GenerateRequest(input="x", triggers=(Trigger("t", when(3)),))),
        (
            "triggers[0].apply.interventions[0]",
            GenerateRequest(input="x", triggers=(Trigger("t", when(1), Apply((Zero("mid", 3),))),)),
        ),
        ("features.features[0]", ActivationRequest(inputs=("x",), selection=FeatureSelection((SECRET,)))),
        (
            "interventions[0]",
            ActivationRequest(
                inputs=("x",), saes=("mid",), selection=TopKSelection(1), interventions=(Zero("mid", 3),)
            ),
        ),
    ],
)
def test_nobody_names_a_withheld_feature(field: str, request_: Any) -> None:
    with pytest.raises(PolicyRefusal, match="policy 'a' does not allow it: feature 3 of 'mid' is withheld") as caught:
        check_withheld(request_, Withheld((("b", frozenset()), ("a", frozenset({SECRET})))))
    assert caught.value.field == field
    check_withheld(request_, Withheld((("a", frozenset({FeatureRef("mid", 9), FeatureRef("other", 3)})),)))


rows = st.lists(st.dictionaries(st.integers(0, 9), st.floats(0.5, 9, width=32), max_size=8), min_size=1, max_size=5)


def part_of(tokens: list[list[tuple[int, float]]], withheld: tuple[int, ...] = ()) -> ActivationPart:
    ends = array("q", [0])
    for token in tokens:
        ends.append(ends[-1] + len(token))
    entries = [entry for token in tokens for entry in token]
    indices, values = array("I", (index for index, _ in entries)), array("f", (value for _, value in entries))
    texts = tuple(TokenText(1, "a") for _ in tokens)
    return ActivationPart(0, "mid", texts, ends, indices, values, 0, True, withheld)


@given(rows=rows, hidden=st.sets(st.integers(0, 9), min_size=1, max_size=4), k=st.none() | st.integers(1, 6))
def test_a_selection_by_size_is_that_of_the_other_features(
    rows: list[dict[int, float]], hidden: set[int], k: int | None
) -> None:
    selection = ThresholdSelection(0.1) if k is None else TopKSelection(k)
    ordered = [sorted(row.items(), key=lambda entry: (-entry[1], entry[0])) for row in rows]
    wide = widened(selection, len(hidden))
    most = wide.k if isinstance(wide, TopKSelection) else None
    names = tuple(sorted(hidden))
    shown = without_withheld(part_of([row[:most] for row in ordered]), names, selection)
    assert shown == part_of([[entry for entry in row if entry[0] not in hidden][:k] for row in ordered], names)


EDIT = CompiledEdit("mid", 2, "cap", Affine(hi=2.0), 0, 9, special=False, origin=Origin("a", "less"), digest="d")
GUARD = CompiledCondition(
    terms=(("mid", 5, 1.0),), threshold=1.0, release=1.0, is_trigger=True, origin=Origin("a", "end"), digest="e"
)
SILENT = replace(GUARD, is_trigger=False, origin=Origin("a"), terms=(("mid", 7, 1.0),))
STEERING = Steering(
    (EDIT, replace(EDIT, condition_number=2), replace(EDIT, is_shadow=True), replace(EDIT, origin=Origin())),
    digest="x",
    open_digest="o",
    conditions=(GUARD, replace(GUARD, is_shadow=True, origin=Origin("b", "try")), SILENT),
)


def entry(edit: CompiledEdit) -> InterventionReceipt:
    return InterventionReceipt(
        "mid", edit.feature, edit.kind, "s", "site", 9, 4, 0.5, 2.0, 0.1, 1, edit.origin.policy, edit.origin.rule,
        edit.is_shadow,
    )  # fmt: skip


DONE = Completion(
    finish_reason="length", usage=Usage(3, 4), timings=Timings(0, 0, 0), seed=1,
    receipt=Receipt(
        "m", "x", tuple(map(entry, STEERING.edits)), 4,
        (TriggerReceipt("a", "end", False, 9, 2, 5), TriggerReceipt("b", "try", True, 9, 2, 5)),
    ),
    policy=PolicyFacts(1, 2, ("a",), ("b",)),
)  # fmt: skip
MEASURED = ("tokens_edited", "mean_activation", "max_activation", "mean_relative_edit", "tokens_capped")


def caller(*roles: Role) -> Caller:
    return Caller("bot", frozenset(roles))


def told(caller: Caller, withheld: tuple[FeatureRef, ...] = (), done: Completion = DONE) -> Completion:
    return Disclosure().of(done, caller, STEERING, Withheld((("a", frozenset(withheld)),)))


def measured(done: Completion) -> list[bool]:
    """Of each edit, whether anything that was measured is told; then of each trigger."""
    assert done.receipt is not None
    edits = [{getattr(edit, name) is not None for name in MEASURED} for edit in done.receipt.interventions]
    assert all(len(each) == 1 for each in edits)
    triggers = [trigger.tokens_on is not None for trigger in done.receipt.triggers]
    assert triggers == [trigger.first_position is not None for trigger in done.receipt.triggers]
    return [each.pop() for each in edits] + triggers


def test_who_observes_and_reads_policies_is_told_all() -> None:
    assert told(caller(Role.OBSERVE, Role.POLICY_READ)) is DONE
    assert told(caller(Role.ADMIN)) is DONE


def test_without_observe_a_receipt_says_where_edits_were_made_and_not_what_they_met() -> None:
    done = told(caller(Role.GENERATE, Role.STEER, Role.POLICY_READ))
    assert measured(done) == [False] * 6
    assert done.receipt is not None
    assert [edit.tokens_eligible for edit in done.receipt.interventions] == [9] * 4
    assert [trigger.tokens_evaluated for trigger in done.receipt.triggers] == [9, 9]
    assert (done.receipt.steering_digest, done.policy) == ("x", DONE.policy)


def test_without_policy_read_nothing_is_told_of_shadows_nor_a_digest_that_rules_could_be_guessed_by() -> None:
    done = told(caller(Role.GENERATE, Role.OBSERVE))
    assert measured(done) == [True] * 4
    assert done.receipt is not None
    assert not any(each.is_shadow for each in (*done.receipt.interventions, *done.receipt.triggers))
    assert done.policy == PolicyFacts(1, 2, ("a",), ())
    digest, disclosure = done.receipt.steering_digest, Disclosure()
    assert len(digest) == 64
    again = [disclosure.of(DONE, caller(Role.GENERATE), STEERING, Withheld()).receipt for _ in range(2)]
    assert again[0] == again[1]
    assert again[0] is not None
    assert again[0].steering_digest != digest, "another server's key"
    own = Steering(STEERING.edits[3:], digest="x", open_digest="o")
    alone = replace(DONE, receipt=replace(DONE.receipt, interventions=DONE.receipt.interventions[3:], triggers=()))  # type: ignore[type-var]
    assert disclosure.of(alone, caller(Role.STEER), own, Withheld()).receipt.steering_digest == "o"  # type: ignore[union-attr]


def test_a_request_with_shadows_alone_has_no_receipt_for_who_may_not_know() -> None:
    shadow = Steering(STEERING.edits[2:3], digest="x")
    done = replace(DONE, receipt=Receipt("m", "x", (entry(STEERING.edits[2]),), 4))
    assert Disclosure().of(done, caller(Role.OBSERVE), shadow, Withheld()).receipt is None


@pytest.mark.parametrize(
    ("feature", "expected"),
    [(2, [False, False, False, True]), (5, [True, True, True, False]), (7, [True, False, True, True])],
)
def test_of_withheld_features_nothing_measured_is_told(feature: int, expected: list[bool]) -> None:
    """Of the edit's own, of the trigger's, of the one that an edit depends on."""
    assert measured(told(caller(Role.OBSERVE), (FeatureRef("mid", feature),))) == expected


def test_the_trigger_that_ended_a_generation_does_not_say_where_its_feature_passed_the_threshold() -> None:
    done = told(caller(Role.GENERATE), (), replace(DONE, finish_reason="feature", stopped_by=StoppedBy("a", "end")))
    assert measured(done) == [False] * 4


def test_limits_that_withhold_are_limits() -> None:
    assert policy("a", rule("none", Zero("mid", 2)), limits=LIMITS).limits != PolicyLimits()
