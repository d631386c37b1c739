"""Shares: stable, growing without losing anyone, and near what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from saeguard.types import Zero
from saeguard_server.policy.model import Rollout
from saeguard_server.policy.rules import is_chosen, rollout_position
from support.policy_shapes import policy, rule

ONE = policy("calm", rule("none", Zero("mid", 2)))
CALLERS = [f"caller-{number}" for number in range(4000)]


def chosen(share: float, by: str = "caller", name: str = "calm") -> set[str]:
    one = replace(ONE, name=name, rollout=Rollout(share=share, by=by))
    return {key for key in CALLERS if is_chosen(one, key, "" if by == "caller" else f"about {key}")}


def test_the_hash_is_the_one_that_other_replicas_and_releases_have() -> None:
    found = [rollout_position("calm", by, "bot") for by in ("caller", "conversation")]
    assert [round(one, 6) for one in found] == [0.009062, 0.974821]


@pytest.mark.parametrize("by", ["caller", "conversation"])
def test_a_share_that_grows_keeps_everyone(by: str) -> None:
    last: set[str] = set()
    for share in (0.0, 0.01, 0.1, 0.5, 0.9, 1.0):
        now = chosen(share, by)
        assert last <= now
        assert len(now) / len(CALLERS) == pytest.approx(share, abs=0.03)
        last = now
    assert len(last) == len(CALLERS)


def test_policies_choose_independently() -> None:
    both = chosen(0.5) & chosen(0.5, name="other")
    assert len(both) / len(CALLERS) == pytest.approx(0.25, abs=0.03)


def test_conversations_count_where_there_are_some() -> None:
    assert chosen(0.5, "conversation") != chosen(0.5)
    half = replace(ONE, rollout=Rollout(share=0.5, by="conversation"))
    without = {key for key in CALLERS if is_chosen(half, key, "")}
    assert without == chosen(0.5)
