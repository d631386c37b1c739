"""A server follows its store, or serves nothing: every way in which following goes wrong, by a clock of our own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from saeguard.catalog import Activation
from saeguard_server.errors import ActivationNotReached, PoliciesUnavailable
from saeguard_server.observe import Metrics
from saeguard_server.policy.model import PolicyRevision
from saeguard_server.policy.snapshot import PoliciesInForce, Snapshot
from saeguard_server.policy.store.protocol import Active, ContentRefused, NothingActive, PolicyStore, StoreUnreachable
from saeguard_server.policy.sync import PolicySync
from support.policies import a_policy

STALE_AFTER_S = 30.0


def active(number: int, revision: int | None = None, digest: str | None = None) -> Active:
    of = number if revision is None else revision
    time_of = datetime.now(UTC)
    act = Activation(number=number, revision=of, actor="eve", time=time_of, reason="now")
    policies = (a_policy(value=float(of)),)
    made = PolicyRevision(number=of, policies=policies, author="ann", time=time_of, reason="because")
    return Active(act, made, digest or f"digest-{number}-{of}")


@dataclass
class ScriptedStore:
    """Says what a test sets."""

    says: Active | Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    looks: int = 0

    async def active(self) -> Active | None:
        self.looks += 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    async def wait(self, timeout_s: float) -> None:
        await self.changed.wait()
        self.changed.clear()


@dataclass
class Followed:
    """A store, what follows it, and a clock that the test moves."""

    store: ScriptedStore
    policies: PoliciesInForce
    sync: PolicySync
    metrics: Metrics
    clock: list[float]
    broken: set[int]

    @property
    def revision(self) -> int | None:
        try:
            return self.policies.current().revision.number
        except PoliciesUnavailable:
            return None

    def failures(self, reason: str) -> float:
        return self.metrics.policy_sync_failures.labels(reason=reason)._value.get()

    async def look(self, says: Active | Exception | None) -> None:
        """One round of following."""
        self.store.says = says
        await self.sync.look_now()


@pytest.fixture
def followed(metrics: Metrics) -> Followed:
    clock = [1000.0]
    broken: set[int] = set()

    def build(found: Active) -> Snapshot:
        if found.revision.number in broken:
            raise ValueError("rules[0].feature: must be below 8, got 9")
        return Snapshot(found.activation, found.revision, cast(Any, None), {}, {})

    store, policies = ScriptedStore(), PoliciesInForce(STALE_AFTER_S, lambda: clock[0])
    sync = PolicySync(cast(PolicyStore, store), policies, build, metrics, poll_s=1.0, clock=lambda: clock[0])
    return Followed(store, policies, sync, metrics, clock, broken)


async def test_each_activation_is_applied_in_turn(followed: Followed) -> None:
    assert followed.revision is None
    await followed.look(active(1, 4))
    assert followed.revision == 4
    before = followed.policies.current()
    await followed.look(active(1, 4))
    assert followed.policies.current() is before
    await followed.look(active(2, 3))
    assert followed.revision == 3
    assert before.revision.number == 4
    registry = followed.metrics.registry
    assert registry.get_sample_value("saeguard_policy_revision") == 3
    assert registry.get_sample_value("saeguard_policy_activation") == 2
    made = registry.get_sample_value("saeguard_policy_activation_time_seconds")
    assert made is not None
    assert abs(made - datetime.now(UTC).timestamp()) < 60
    assert registry.get_sample_value("saeguard_policy_apply_lag_seconds_count") == 1


async def test_nothing_active_is_not_no_policies(followed: Followed) -> None:
    await followed.look(None)
    assert followed.revision is None
    assert followed.failures(NothingActive.reason) == 1


async def test_without_the_store_what_was_in_force_stays_until_the_lease_is_over(followed: Followed) -> None:
    await followed.look(active(1))
    for _ in range(29):
        followed.clock[0] += 1.0
        await followed.look(StoreUnreachable("connection refused"))
        assert followed.revision == 1
    followed.clock[0] += 1.0
    assert followed.revision is None
    with pytest.raises(PoliciesUnavailable, match="could not be confirmed for 30"):
        followed.policies.current()
    assert followed.failures("unreachable") == 29
    assert followed.metrics.registry.get_sample_value("saeguard_policy_sync_age_seconds") == 30.0
    await followed.look(active(1))
    assert followed.revision == 1


async def test_the_lease_counts_from_before_the_look(followed: Followed) -> None:
    """What a slow store says at last may be as old as the question."""
    await followed.look(active(1))

    async def slow() -> Active:
        followed.clock[0] += 20.0
        return active(1)

    followed.store.active = slow  # type: ignore[method-assign]
    await followed.sync.look_now()
    followed.clock[0] += 9.9
    assert followed.revision == 1
    followed.clock[0] += 0.2
    assert followed.revision is None


async def test_a_jump_of_the_wall_clock_changes_nothing(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    await followed.look(active(1))
    for jump in (86_400.0 * 365, -86_400.0 * 365):
        now = time.time() + jump
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert followed.revision == 1
        await followed.look(active(1))
        assert followed.revision == 1
    early = active(2)
    long_ago = replace(early.activation, time=datetime(1970, 1, 1, tzinfo=UTC))
    await followed.look(replace(early, activation=long_ago))
    assert followed.revision == 2


async def test_what_cannot_be_applied_here_is_refused_at_once(followed: Followed) -> None:
    await followed.look(active(1))
    followed.broken.add(2)
    await followed.look(active(2))
    with pytest.raises(PoliciesUnavailable, match="revision 2 cannot be applied here") as caught:
        followed.policies.current()
    assert "rules" not in caught.value.message, "what is wrong, callers need not know"
    assert followed.failures("not_applicable") == 1
    await followed.look(StoreUnreachable("connection refused"))
    assert followed.revision is None
    await followed.look(active(3, 1))
    assert followed.revision == 1


async def test_files_that_go_back_to_what_could_be_applied_are_applied(followed: Followed) -> None:
    await followed.look(active(0, 0, "good"))
    followed.broken.add(9)
    await followed.look(active(0, 9, "bad"))
    assert followed.revision is None
    await followed.look(active(0, 0, "good"))
    assert followed.revision == 0


async def test_refused_files_keep_the_set_in_force(followed: Followed) -> None:
    await followed.look(ContentRefused("calm.yaml: half"))
    assert followed.revision is None
    await followed.look(active(1))
    for _ in range(5):
        followed.clock[0] += 20.0
        await followed.look(ContentRefused("calm.yaml: half"))
        assert followed.revision == 1
    assert followed.failures("content") == 6
    followed.clock[0] += STALE_AFTER_S
    await followed.look(StoreUnreachable("no such directory"))
    assert followed.revision is None


@pytest.mark.parametrize("older", [active(4), active(5, 9), active(0, 0)])
async def test_a_store_that_went_back_is_not_followed(followed: Followed, older: Active) -> None:
    """A restored backup may lack the policy that matters."""
    await followed.look(active(5))
    followed.clock[0] += 20.0
    await followed.look(older)
    assert followed.revision == 5
    assert followed.failures("went_back") == 1
    followed.clock[0] += 10.0
    assert followed.revision is None
    await followed.look(active(6))
    assert followed.revision == 6


async def test_a_failure_is_said_once_and_its_end_too(followed: Followed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "saeguard.policies")
    await followed.look(active(1))
    for _ in range(3):
        await followed.look(StoreUnreachable("connection refused"))
    await followed.look(RuntimeError("a bug"))
    await followed.look(active(1))
    said = [(record.levelname, record.message) for record in caplog.records]
    assert said == [
        ("INFO", "policies applied"),
        ("ERROR", "policies cannot be followed"),
        ("ERROR", "policies cannot be followed"),
        ("INFO", "policies are followed again"),
    ]
    assert followed.failures("internal") == 1


async def test_it_follows_until_its_block_ends(followed: Followed, eventually: Callable[[Any], Any]) -> None:
    followed.store.says = active(1)
    async with followed.sync.running():
        assert followed.revision == 1
        followed.store.says = active(2)
        waiting = asyncio.create_task(followed.policies.at_least(2, time.monotonic() + 10.0))
        await asyncio.sleep(0)
        followed.store.changed.set()
        assert (await asyncio.wait_for(waiting, 2.0)).revision.number == 2
        followed.store.says = RuntimeError("a bug")
        followed.store.changed.set()
        await eventually(lambda: followed.failures("internal") == 1)
        followed.store.says = active(3)
        followed.store.changed.set()
        await eventually(lambda: followed.revision == 3)
    looks = followed.store.looks
    followed.store.changed.set()
    await asyncio.sleep(0.01)
    assert followed.store.looks == looks


async def test_who_demands_what_is_not_in_force_hears_so_in_time(followed: Followed) -> None:
    await followed.look(active(1))
    with pytest.raises(ActivationNotReached, match="2 is not in force here yet, 1 is"):
        await followed.policies.at_least(2, time.monotonic() + 0.27)
