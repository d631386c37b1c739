"""What becomes of a request: what is enforced, what is counted, what it asks; and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from saeguard_sae.edits import Add, Affine, Cap, Clamp, Edit, Floor, Scale, Zero
from saeguard_server.errors import InvalidRequest, PolicyRefusal, UnknownName
from saeguard_server.interventions import Apply, Condition, FeatureRef, Flag, Intervention, Origin, Scope, Stop, Trigger
from saeguard_server.policy.model import Limits
from saeguard_server.policy.resolve import resolve_policies
from saeguard_server.request import GenerationRequest, TextInput
from support.policy_shapes import NOW, policy, rule, when
from support.resolving import BOT, InForce, edit, made, resolved

NONE = Affine(alpha=0.0)


def test_what_is_enforced_comes_first_then_shadows_then_the_requests_own(in_force: InForce) -> None:
    snapshot = in_force(
        policy("a", rule("less", Cap(2.0))),
        policy("b", rule("none", Zero(), 3), mode="shadow"),
        policy("c", rule("none", Zero(), 5)),
        policy("d", rule("none", Zero(), 6), mode="off"),
    )
    found = resolved(snapshot, edit(Add(1.0), 7), max_relative_edit=0.5)
    assert made(found) == [
        ("a", "less", 2, "cap", Affine(hi=2.0)),
        ("c", "none", 5, "zero", NONE),
        ("~b", "none", 3, "zero", NONE),
        ("", "", 7, "add", Affine(beta=1.0)),
    ]
    assert [one.edit.is_limited for one in found.edits] == [False, False, False, True]
    assert (found.facts.activation, found.facts.revision) == (3, 7)
    assert (found.facts.enforced, found.facts.shadowed) == (("a", "c"), ("b",))
    assert found.max_relative_edit == 0.5


@pytest.mark.parametrize(
    ("enforced", "asked", "result"),
    [
        (Cap(2.0), Cap(1.0), ("cap", Affine(hi=1.0))),
        (Cap(2.0), Cap(3.0), ("cap", Affine(hi=2.0))),
        (Cap(2.0), Zero(), ("zero", NONE)),
        (Cap(2.0), Add(1.0), ("add", Affine(beta=1.0, hi=2.0))),
        (Cap(1.0, "max"), Floor(4.0), ("cap", Affine(lo=4.0, hi=7.5))),
        (Zero(), Cap(3.0), ("zero", NONE)),
    ],
)
def test_a_request_may_tighten_a_rule_and_the_edit_is_the_rules(
    enforced: Edit, asked: Edit, result: tuple[str, Affine], in_force: InForce
) -> None:
    found = resolved(in_force(policy("a", rule("less", enforced))), edit(asked), max_relative_edit=0.1)
    assert made(found) == [("a", "less", 2, *result)]
    # The request's limit is of its own edits, and it has none left.
    assert found.max_relative_edit is None


@pytest.mark.parametrize(
    ("enforced", "asked", "field"),
    [
        (Zero(), Clamp(3.0), "clamp"),
        (Cap(2.0), Floor(3.0), "floor"),
        (Cap(0.1, "max"), Floor(0.8), "floor"),
        (Scale(0.5), Add(-1.0), "add"),
    ],
)
def test_what_weakens_is_refused_by_field_policy_and_rule(
    enforced: Edit, asked: Edit, field: str, in_force: InForce
) -> None:
    snapshot = in_force(policy("a", rule("less", enforced)))
    with pytest.raises(PolicyRefusal, match="rule 'less' of policy 'a' does not allow it") as caught:
        resolved(snapshot, edit(Add(0.5), 3), edit(asked))
    assert caught.value.field == f"interventions[1].{field}"
    assert caught.value.facts == {"policy": "a", "rule": "less"}


@pytest.mark.parametrize(
    ("of_rule", "asked", "result"),
    [
        ({"scope": Scope("prompt")}, edit(Clamp(9.0), scope=Scope("generated")), "both"),
        ({"scope": Scope(end=4)}, edit(Clamp(9.0), scope=Scope(start=4)), "both"),
        ({"scope": Scope("prompt")}, edit(Cap(1.0), scope=Scope("prompt")), "tightened"),
        ({"when": when()}, edit(Cap(1.0), when=when()), "tightened"),
        ({}, edit(Cap(5.0), scope=Scope("generated")), "rule"),
        ({}, edit(Cap(5.0), when=when()), "rule"),
        ({}, edit(Cap(1.0), scope=Scope("generated")), "scope and condition"),
        ({}, edit(Cap(5.0), scope=Scope(include_special_tokens=True)), "scope and condition"),
        ({}, edit(Cap(1.0), when=when()), "scope and condition"),
        ({"scope": Scope("prompt")}, edit(Cap(1.0)), "scope and condition"),
        ({"when": when()}, edit(Cap(1.0)), "scope and condition"),
        ({"when": when()}, edit(Cap(1.0), when=when(above=3.0)), "scope and condition"),
    ],
)
def test_scopes_and_conditions(of_rule: dict[str, Any], asked: Intervention, result: str, in_force: InForce) -> None:
    snapshot = in_force(policy("a", rule("less", Cap(2.0), **of_rule)))
    if result == "scope and condition":
        with pytest.raises(PolicyRefusal, match=result) as caught:
            resolved(snapshot, asked)
        assert caught.value.field in ("interventions[0].scope", "interventions[0].when")
        return
    bounds = {"both": [2.0, None], "tightened": [1.0], "rule": [2.0]}[result]
    kinds = [affine.hi if affine.alpha else None for *_, affine in made(resolved(snapshot, asked))]
    assert kinds == bounds


def trigger(name: str, *edits: Intervention, on: Condition | None = None) -> Trigger:
    return Trigger(name, on or when(), Apply(edits))


def test_a_requests_triggers_do_not_weaken_a_rule_either(in_force: InForce) -> None:
    snapshot = in_force(policy("a", rule("less", Cap(2.0))))
    found = resolved(snapshot, triggers=(trigger("t", edit(Cap(3.0)), edit(Zero(), 3)), Trigger("s", when(), Stop())))
    assert [len(one.edits) for one in found.triggers] == [1, 0]
    alone = resolved(snapshot, triggers=(trigger("t", edit(Cap(3.0))),), max_relative_edit=0.2)
    assert [len(one.edits) for one in alone.triggers] == [0]
    assert alone.max_relative_edit is None
    with pytest.raises(PolicyRefusal, match="scope and condition") as caught:
        resolved(snapshot, triggers=(trigger("t", edit(Zero(), 3), edit(Cap(1.0))),))
    assert caught.value.field == "triggers[0].apply.interventions[1].when"


def test_a_policys_triggers_are_decided_and_their_features_left_alone(in_force: InForce) -> None:
    watch = policy(
        "a", triggers=(trigger("calm", edit(Zero(), scope=Scope("generated"))), Trigger("end", when(), Stop()))
    )
    snapshot = in_force(watch, policy("b", triggers=(Trigger("seen", when(), Flag()),), mode="shadow"))
    own = Trigger("mine", when(), Flag())
    found = resolved(snapshot, edit(Cap(1.0), scope=Scope("prompt")), triggers=(own,))
    guards = [one.guard.guard for one in found.triggers]
    assert [(one.origin, one.is_shadow, one.stops) for one in guards] == [
        (Origin("a", "calm"), False, False),
        (Origin("a", "end"), False, True),
        (Origin("b", "seen"), True, False),
        (Origin("", "mine"), False, False),
    ]
    with pytest.raises(PolicyRefusal, match="'calm' of policy 'a'"):
        resolved(snapshot, edit(Cap(1.0)))


def test_rules_of_two_policies_are_kept_together(in_force: InForce) -> None:
    snapshot = in_force(
        policy("a", rule("twice", Scale(2.0), 3), rule("less", Cap(2.0))),
        policy("b", rule("least", Cap(1.0)), rule("bound", Cap(5.0), 3)),
        policy("c", rule("in-prompt", Cap(9.0), scope=Scope("prompt"))),
    )
    assert sorted(made(resolved(snapshot))) == [
        ("a", "twice", 3, "scale", Affine(alpha=2.0, hi=5.0)),
        ("b", "least", 2, "cap", Affine(hi=1.0)),
    ]
    found = made(resolved(snapshot, edit(Scale(3.0), 3)))
    assert ("a", "twice", 3, "scale", Affine(alpha=3.0, hi=5.0)) in found
    with pytest.raises(PolicyRefusal, match="rule 'bound' of policy 'b'"):
        resolved(snapshot, edit(Clamp(6.0), 3))


def test_the_strictest_limit_holds_for_the_requests_own_edits(in_force: InForce) -> None:
    limits = policy("a", limits=Limits(max_relative_edit=0.3)), policy("b", limits=Limits(max_relative_edit=0.2))
    snapshot = in_force(*limits)
    assert resolved(snapshot, edit(Zero())).max_relative_edit == 0.2
    assert resolved(snapshot, edit(Zero()), max_relative_edit=0.1).max_relative_edit == 0.1
    assert resolved(snapshot, edit(Zero()), max_relative_edit=0.5).max_relative_edit == 0.2
    assert resolved(snapshot).max_relative_edit is None
    # Nothing to limit: left as it was asked, for `steer` to refuse.
    assert resolved(snapshot, max_relative_edit=0.5).max_relative_edit == 0.5
    assert resolved(snapshot, triggers=(Trigger("t", when(), Flag()),), max_relative_edit=0.5).max_relative_edit == 0.5
    assert resolved(in_force(replace(limits[0], mode="shadow")), edit(Zero())).max_relative_edit is None


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(denied_saes=("mid",)), "sae"),
        (Limits(allowed_saes=("late",)), "sae"),
        (Limits(denied_features=(FeatureRef("mid", 2),)), "feature"),
        (Limits(allowed_features=(FeatureRef("mid", 3),)), "feature"),
        (Limits(allowed_features=()), "feature"),
        (Limits(allowed_saes=("mid",), allowed_features=(FeatureRef("mid", 2),)), None),
    ],
)
def test_what_callers_may_not_touch(limits: Limits, field: str | None, in_force: InForce) -> None:
    snapshot = in_force(policy("a", limits=limits))
    requests = {
        "interventions[0]": {"interventions": (edit(Zero()),)},
        "triggers[0].apply.interventions[0]": {"triggers": (trigger("t", edit(Zero())),)},
    }
    for where, wanted in requests.items():
        request = GenerationRequest(prompt=TextInput("x"), **wanted)
        if field is None:
            resolve_policies(request, BOT, snapshot, NOW)
            continue
        with pytest.raises(PolicyRefusal, match="policy 'a'") as caught:
            resolve_policies(request, BOT, snapshot, NOW)
        assert (caught.value.field, caught.value.facts) == (f"{where}.{field}", {"policy": "a"})


def test_a_requests_own_mistakes_are_its_own(in_force: InForce) -> None:
    snapshot = in_force(policy("a", rule("less", Cap(2.0))))
    with pytest.raises(UnknownName, match=r"interventions\[0\].sae"):
        resolved(snapshot, edit(Zero(), sae="nope"))
    with pytest.raises(InvalidRequest, match=r"interventions\[0\].cap.unit"):
        resolved(snapshot, edit(Cap(1.0, "max"), 1))


def test_nothing_is_worked_out_twice(in_force: InForce) -> None:
    snapshot = in_force(policy("a", rule("less", Cap(2.0))), policy("b", rule("none", Zero(), 3)))
    first, second = resolved(snapshot), resolved(snapshot, edit(Add(1.0), 7))
    assert first.edits == second.edits[:2]
    assert first.edits is resolved(snapshot).edits


def test_what_else_a_resolution_says(in_force: InForce, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeguard_server.steering.ServedModel.keeps_audit", True)
    monkeypatch.setattr("saeguard_server.steering.ServedModel.compares", True)
    snapshot = in_force(
        policy("a", rule("less", Cap(2.0)), counterfactual_share=0.25),
        policy("b", rule("none", Zero(), 3), requires_audit=True, mode="shadow"),
    )
    found = resolved(snapshot)
    assert found.counterfactual == (("a", 0.25),)
    assert found.requires_audit
