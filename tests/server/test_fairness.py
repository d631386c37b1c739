"""Turns: nobody waits longer than others' shares make them, order within a caller, leaving, slow readers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from saeguard_server import fair_queue
from saeguard_server.engine.pace import StepPace
from saeguard_server.errors import Overloaded
from saeguard_server.fair_queue import FairQueue
from saeguard_server.forecast import Work
from saeguard_server.observe import Metrics

FULL = 10**9


@dataclass
class Engine:
    """An engine whose queue a test sets; by default it is so full that only those who leave make room."""

    waiting: int = FULL
    pace: StepPace = field(default_factory=StepPace)

    def queued(self) -> int:
        return self.waiting


@dataclass
class Hall:
    """Requests, as tasks that a test ends one by one."""

    turns: FairQueue
    entered: list[tuple[str, int]] = field(default_factory=list)
    tasks: dict[tuple[str, int], asyncio.Task[None]] = field(default_factory=dict)
    inside: dict[tuple[str, int], asyncio.Event] = field(default_factory=dict)

    def come(self, caller: str, number: int, cost: int) -> None:
        self.tasks[caller, number] = asyncio.create_task(self._request((caller, number), cost))

    async def _request(self, name: tuple[str, int], cost: int) -> None:
        async with self.turns.turn(name[0], Work(cost)):
            self.entered.append(name)
            self.inside[name] = asyncio.Event()
            try:
                await self.inside[name].wait()
            finally:
                del self.inside[name]

    def end_oldest(self) -> None:
        if self.inside:
            next(iter(self.inside.values())).set()

    async def drain(self) -> None:
        while self.turns.waiting or self.inside:
            self.end_oldest()
            await settle()


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


def hall(slots: int, engine: Engine | None = None) -> Hall:
    return Hall(FairQueue(engine or Engine(), Metrics(CollectorRegistry()), slots))


def run(test: Callable[[], object]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


costs = st.integers(1, 50)


@settings(deadline=None)
@given(
    slots=st.integers(1, 3),
    lines=st.dictionaries(st.sampled_from("abcd"), st.lists(costs, min_size=1, max_size=12), min_size=1),
)
def test_callers_who_wait_are_served_alike_and_each_in_its_order(slots: int, lines: dict[str, list[int]]) -> None:
    async def test() -> None:
        one = hall(slots)
        for number in range(slots):
            one.come("first", number, 1)
        await settle()
        for caller, given_costs in lines.items():
            for number, cost in enumerate(given_costs):
                one.come(caller, number, cost)
        await settle()
        assert one.turns.waiting == sum(map(len, lines.values()))
        await one.drain()
        came = [name for name in one.entered if name[0] != "first"]
        served: dict[str, int] = defaultdict(int)
        left = {caller: len(given_costs) for caller, given_costs in lines.items()}
        for caller, number in came:
            assert number == len(lines[caller]) - left[caller], "a caller's requests keep their order"
            served[caller] += lines[caller][number]
            left[caller] -= 1
            waiting = [one for one in lines if left[one]]
            for one_name in waiting:
                for other in waiting:
                    bound = max(lines[one_name]) + max(lines[other])
                    assert abs(served[one_name] - served[other]) <= bound
        assert not any(left.values())

    run(test)


@settings(deadline=None)
@given(st.data())
def test_everybody_gets_in_or_leaves_whatever_happens_in_between(data: st.DataObject) -> None:
    async def test() -> None:
        one, slots = hall(2), 2
        left = set()
        for number in range(data.draw(st.integers(1, 25))):
            act = data.draw(st.sampled_from(["come", "come", "come", "end", "cancel"]))
            if act == "come":
                one.come(data.draw(st.sampled_from("abc")), number, data.draw(costs))
            elif act == "end":
                one.end_oldest()
            elif one.tasks:
                name = data.draw(st.sampled_from(sorted(one.tasks)))
                one.tasks[name].cancel()
                left.add(name)
            if data.draw(st.booleans()):
                await settle()
            assert len(one.inside) <= slots
        await settle()
        await one.drain()
        await asyncio.gather(*one.tasks.values(), return_exceptions=True)
        assert {name for name in one.tasks if name not in one.entered} <= left
        assert (one.turns.waiting, one.turns._running) == (0, 0)
        assert not one.turns._order
        assert not one.turns._lines

    run(test)


async def test_a_thousand_requests_do_not_starve_another_caller() -> None:
    one = hall(4)
    for number in range(1000):
        one.come("greedy", number, 100)
    await settle()
    for number in range(3):
        one.come("modest", number, 100)
    await settle()
    for _ in range(10):
        one.end_oldest()
        await settle()
    assert [name for name in one.entered if name[0] == "modest"] == [("modest", 0), ("modest", 1), ("modest", 2)]
    for task in one.tasks.values():
        task.cancel()
    await asyncio.gather(*one.tasks.values(), return_exceptions=True)


async def test_alone_nobody_waits_while_the_engine_has_room() -> None:
    one = hall(8, Engine(waiting=0))
    for number in range(10):
        one.come("a", number, 5)
    await settle()
    # Eight slots, and two more ahead so that no slot is ever idle for want of a request.
    assert len(one.entered) == 10
    assert one.turns.waiting == 0
    one.come("a", 10, 5)
    await settle()
    assert one.turns.waiting == 1
    await one.drain()


async def test_slots_that_slow_readers_no_longer_need_are_given_to_others() -> None:
    engine = Engine()
    one = hall(2, engine)
    for number in range(2):
        one.come("slow", number, 5)
    await settle()
    one.come("quick", 0, 5)
    await asyncio.sleep(3 * fair_queue.POLL_S)
    assert ("quick", 0) not in one.entered
    engine.waiting = 0  # both are generated; their callers have not read them
    async with asyncio.timeout(2):
        while ("quick", 0) not in one.entered:
            await asyncio.sleep(fair_queue.POLL_S)
    await one.drain()


async def test_a_caller_with_fewer_waiting_takes_the_place_of_one_with_more() -> None:
    one = hall(1)
    for number in range(5):
        one.come("greedy", number, 5)
    await settle()
    refusal = Overloaded("full", 1.0)
    assert one.turns.evict("modest", refusal)
    await settle()
    assert one.tasks["greedy", 4].exception() is refusal
    one.come("modest", 0, 5)
    one.come("modest", 1, 5)
    await settle()
    assert not one.turns.evict("modest", refusal), "three of the other, and three would be of this one"
    assert not one.turns.evict("greedy", refusal)
    await one.drain()
    assert len(one.entered) == 6


async def test_not_every_caller_is_remembered_for_ever() -> None:
    one = hall(1)
    one.come("first", 0, 1)
    await settle()
    for number in range(fair_queue.MAX_REMEMBERED + 100):
        one.come(f"caller-{number}", 0, 1)
        await settle()
        one.end_oldest()
        await settle()
    assert len(one.turns._lines) <= fair_queue.MAX_REMEMBERED
    await one.drain()


def test_the_gauge_follows(metrics: Metrics) -> None:
    async def test() -> None:
        one = Hall(FairQueue(Engine(), metrics, 1))
        for number in range(3):
            one.come("a", number, 1)
        await settle()
        assert metrics.queue_waiting._value.get() == 2
        await one.drain()
        assert metrics.queue_waiting._value.get() == 0

    run(test)


@pytest.mark.parametrize("when", ["waiting", "its turn comes"])
async def test_whoever_leaves_frees_what_it_held(when: str) -> None:
    one = hall(1)
    for number in range(3):
        one.come("a", number, 1)
    await settle()
    if when == "its turn comes":
        one.end_oldest()
        while one.turns.waiting == 2:
            await asyncio.sleep(0)
        assert ("a", 1) not in one.entered
    one.tasks["a", 1].cancel()
    await settle()
    await one.drain()
    assert ("a", 2) in one.entered
    assert one.turns._running == 0
