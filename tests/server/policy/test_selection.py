"""Which policies are on a request: by target, rollout and time, and because it asks."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from saeguard.types import Clamp, Intervention, Zero
from saeguard_server.errors import InvalidRequest, PoliciesUnavailable, PolicyRefusal, UnknownName
from saeguard_server.policy.model import Policy, Rollout, Target
from saeguard_server.policy.resolve import resolve_policies
from support.policy_shapes import NOW, policy, rule
from support.resolving import BOT, READER, InForce, asks, resolved


@pytest.mark.parametrize(
    ("target", "is_hit"),
    [
        (Target(), True),
        (Target(callers=("bot", "x")), True),
        (Target(callers=("x",)), False),
        (Target(tags=("public",)), True),
        (Target(tags=("internal",)), False),
        (Target(callers=("bot",), tags=("internal",)), False),
        (Target(models=("fake",)), True),
        (Target(models=("other",)), False),
    ],
)
def test_whose_requests(target: Target, is_hit: bool, in_force: InForce) -> None:
    found = resolved(in_force(policy("a", rule("none", Zero("mid", 2)), target=target)))
    assert found.selected.facts.applied == (("a",) if is_hit else ())


def test_a_policy_ends_when_it_expires(in_force: InForce) -> None:
    snapshot = in_force(policy("a", rule("none", Zero("mid", 2)), expires=NOW + timedelta(seconds=1)))
    assert resolve_policies(*asks(), snapshot, NOW).edits
    assert not resolve_policies(*asks(), snapshot, NOW + timedelta(seconds=1)).edits
    with pytest.raises(InvalidRequest, match=r"policies\[0\]: 'a' has expired"):
        resolve_policies(*asks(policies=("a",), caller=READER), snapshot, NOW + timedelta(seconds=1))


def test_callers_may_ask_for_policies(in_force: InForce) -> None:
    elsewhere = Rollout(share=0.0)
    snapshot = in_force(
        policy("a", rule("none", Zero("mid", 2)), rollout=elsewhere),
        policy("b", rule("none", Zero("mid", 3)), rollout=elsewhere, mode="shadow"),
        policy("c", rule("none", Zero("mid", 5)), mode="off"),
        policy("d", rule("none", Zero("mid", 5)), target=Target(models=("other",))),
    )
    assert not resolved(snapshot).edits
    found = resolved(snapshot, policies=("b", "a"), caller=READER)
    assert (found.selected.facts.applied, found.selected.facts.shadowed) == (("a",), ("b",))
    with pytest.raises(UnknownName, match=r"policies\[1\]: no policy 'z' is in force"):
        resolved(snapshot, policies=("a", "z"), caller=READER)
    for name, said in (("c", "is off"), ("d", "is for other models")):
        with pytest.raises(InvalidRequest, match=rf"policies\[0\]: '{name}' {said}"):
            resolved(snapshot, policies=(name,), caller=READER)


def test_who_may_not_read_policies_can_name_those_aimed_at_it_and_learns_of_no_other(in_force: InForce) -> None:
    def zero(name: str, **more: Any) -> Policy:
        return policy(name, rule("none", Zero("mid", 2)), **more)

    snapshot = in_force(
        zero("mine", target=Target(callers=("bot",)), rollout=Rollout(share=0.0)),
        zero("theirs", target=Target(callers=("human",))),
        zero("tagged", target=Target(tags=("internal",))),
        zero("trial", mode="shadow"),
        zero("sleeping", mode="off"),
        zero("over", expires=NOW),
        zero("elsewhere", target=Target(models=("other",))),
    )
    assert resolved(snapshot, policies=("mine",)).selected.facts.applied == ("mine",)
    refusals = []
    for name in ("theirs", "tagged", "trial", "sleeping", "over", "elsewhere", "nobodys"):
        with pytest.raises(UnknownName) as caught:
            resolved(snapshot, policies=("mine", name))
        refusals.append((caught.value.field, dict(caught.value.facts), caught.value.message.replace(name, "...")))
    assert refusals == [refusals[0]] * 7
    assert "no policy '...' is enforced and aimed at bot; naming others needs the role policy-read" in refusals[0][2]


def test_the_conversation_of_a_token_is_what_a_rollout_hashes(in_force: InForce) -> None:
    half = Rollout(share=0.5, by="conversation")
    snapshot = in_force(policy("a", rule("none", Zero("mid", 2)), rollout=half))
    names = [f"c{number}" for number in range(40)]
    chosen = [bool(resolved(snapshot, conversation=name).edits) for name in names]
    assert 10 < sum(chosen) < 30
    for name, is_chosen in zip(names, chosen, strict=True):
        assert bool(resolved(snapshot, caller=replace(BOT, conversation=name)).edits) == is_chosen
    silent = replace(BOT, conversation="")
    assert bool(resolved(snapshot, caller=silent).edits) == bool(resolved(snapshot).edits), "it goes by the caller"


def test_two_that_cannot_be_kept_together_fail_closed(in_force: InForce) -> None:
    def one(name: str, kind: Intervention, caller: str) -> Policy:
        return policy(name, rule("r", kind), target=Target(callers=(caller,)))

    snapshot = in_force(one("a", Zero("mid", 2), "bot"), one("b", Clamp("mid", 2, 2.0), "human"))
    assert resolved(snapshot).selected.facts.applied == ("a",)
    with pytest.raises(PolicyRefusal, match=r"policies: .*rule 'r' of policy 'a' and rule 'r' of policy 'b'"):
        resolved(snapshot, policies=("b",), caller=READER)
    # As if a revision had been put in force unchecked.
    ready = {name: one._replace(policy=replace(one.policy, target=Target())) for name, one in snapshot.ready.items()}
    with pytest.raises(PoliciesUnavailable, match="cannot both be kept"):
        resolved(replace(snapshot, ready=ready, _selections={}))
