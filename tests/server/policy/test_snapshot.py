"""What is in force here, for how long, and who waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from saeguard.types import Zero
from saeguard_server.errors import ActivationNotReached, PoliciesUnavailable
from saeguard_server.policy import snapshot as snapshots
from saeguard_server.policy.snapshot import PoliciesInForce, Snapshot
from support.policy_shapes import policy, rule

InForce = Callable[..., Snapshot]
STALE_AFTER_S = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def policies(clock: Clock) -> PoliciesInForce:
    return PoliciesInForce(STALE_AFTER_S, clock)


def test_without_a_snapshot_nothing_is_served(policies: PoliciesInForce) -> None:
    policies.renew()
    assert not policies.is_current()
    with pytest.raises(PoliciesUnavailable, match="no policies have been read yet") as caught:
        policies.current()
    assert (caught.value.reason, caught.value.retry_after_s) == ("POLICIES_UNAVAILABLE", 1.0)


def test_a_lease_runs_out_and_is_renewed(policies: PoliciesInForce, clock: Clock, in_force: InForce) -> None:
    first = in_force(policy("a", rule("none", Zero("mid", 2))))
    policies.replace(first)
    with pytest.raises(PoliciesUnavailable, match="could not be confirmed"):
        policies.current()
    policies.renew()
    assert policies.current() is first
    clock.now += STALE_AFTER_S
    assert not policies.is_current()
    with pytest.raises(PoliciesUnavailable, match=r"could not be confirmed for 30\.0 s; after 30 s nothing is served"):
        policies.current()
    policies.renew(clock.now - 10)
    assert policies.current() is first
    clock.now += 20
    assert not policies.is_current()


def test_what_cannot_be_applied_is_withdrawn(policies: PoliciesInForce, in_force: InForce) -> None:
    one = in_force()
    policies.replace(one)
    policies.renew()
    policies.withdraw("revision 9 cannot be applied here: no SAE")
    policies.renew()
    with pytest.raises(PoliciesUnavailable, match="revision 9 cannot be applied here"):
        policies.current()
    policies.replace(one)
    assert policies.is_current()


async def test_waiting_for_an_activation(policies: PoliciesInForce, in_force: InForce) -> None:
    policies.replace(in_force(number=3))
    policies.renew()
    soon = time.monotonic() + 5.0
    assert (await policies.at_least(3, soon)).activation.number == 3
    waiting = [asyncio.create_task(policies.at_least(number, soon)) for number in (4, 6)]
    await asyncio.sleep(0)
    policies.replace(in_force(number=4))
    assert (await waiting[0]).activation.number == 4
    await asyncio.sleep(0)
    assert not waiting[1].done()
    policies.replace(in_force(number=7))
    assert (await waiting[1]).activation.number == 7


async def test_an_activation_that_does_not_come(
    policies: PoliciesInForce, in_force: InForce, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "ANSWER_S", 0.01)
    policies.replace(in_force(number=3))
    policies.renew()
    for within_s in (-1.0, 0.05):
        with pytest.raises(ActivationNotReached, match="min_policy_activation: 9 is not in force here yet, 3 is"):
            await policies.at_least(9, time.monotonic() + within_s)
    policies.withdraw("gone")
    with pytest.raises(PoliciesUnavailable, match="gone"):
        await policies.at_least(3, time.monotonic() + 1.0)


def test_only_so_many_sets_of_policies_are_remembered(in_force: InForce, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MAX_SELECTIONS", 2)
    snapshot = in_force(*(policy(name, rule("none", Zero("mid", index))) for index, name in enumerate("abc")))
    first = snapshot.selected(("a",))
    assert snapshot.selected(("a",)) is first
    for names in (("b",), ("c",), ("a", "b")):
        snapshot.selected(names)
    assert len(snapshot._selections) <= 2
    assert snapshot.selected(("a",)).enforced.edits == first.enforced.edits
