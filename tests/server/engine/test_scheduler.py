"""Slots in use are always a prefix, and every request leaves exactly once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from saeguard_server.engine.transformers.scheduler import Scheduler
from saeguard_server.engine.transformers.sequence import Sequence

SLOTS = 4


def sequence(uid: int, length: int) -> Sequence:
    task = cast(Any, SimpleNamespace(tokens=tuple(range(length))))
    return Sequence(uid, task, None, lambda event: None)


class Batching(RuleBasedStateMachine):
    """Random joining, reading, finishing and cancelling, with a model of which slot holds whom."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(SLOTS)
        self.held: dict[int, Sequence] = {}
        self.alive: set[int] = set()
        self.count = 0

    @rule(length=st.integers(1, 9))
    def join(self, length: int) -> None:
        self.count += 1
        self.alive.add(self.count)
        self.scheduler.add(sequence(self.count, length))

    @rule(budget=st.integers(1, 5))
    def read(self, budget: int) -> None:
        if admitted := self.scheduler.admit():
            assert admitted.slot not in self.held, "a slot was given out twice"
            self.held[admitted.slot] = admitted
        part = self.scheduler.next_part(budget)
        if part is None:
            return
        assert 0 < part.end - part.start <= budget
        part.sequence.computed = part.end
        if part.is_last:
            self.scheduler.start_generating()

    @precondition(lambda self: self.scheduler.has_work)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.scheduler.everyone()))
        slot = gone.slot
        moves = self.scheduler.remove(gone)
        self.alive.remove(gone.uid)
        if slot >= 0:
            assert self.held.pop(slot) is gone
        for move in moves:
            assert move.target not in self.held, "moved onto a live request"
            self.held[move.target] = self.held.pop(move.source)
            assert self.held[move.target] is move.sequence

    @invariant()
    def slots_are_a_prefix(self) -> None:
        assert sorted(self.held) == list(range(self.scheduler.slots_in_use))
        assert all(one.slot == slot for slot, one in self.held.items())
        assert [one.slot for one in self.scheduler.running] == list(range(len(self.scheduler.running)))

    @invariant()
    def nobody_is_lost(self) -> None:
        assert {one.uid for one in self.scheduler.everyone()} == self.alive


TestBatching = Batching.TestCase
TestBatching.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_first_come_first_served() -> None:
    scheduler = Scheduler(2)
    for uid in range(4):
        scheduler.add(sequence(uid, 3))
    order = []
    while scheduler.has_work:
        if admitted := scheduler.admit():
            order.append(admitted.uid)
        part = scheduler.next_part(10)
        if part:
            scheduler.start_generating()
        else:
            scheduler.remove(scheduler.running[0])
    assert order == [0, 1, 2, 3]
