"""Admission: what is refused, what it says, and when the server is idle."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from math import inf
from typing import Any

import pytest

from saeguard_server.admission import FEW, LoadLimiter, Waiting
from saeguard_server.caller import LOCAL, Call, Caller
from saeguard_server.errors import Overloaded, Unavailable
from saeguard_server.fair_queue import LONGEST_RETRY_S, SHORTEST_RETRY_S, FairQueue
from saeguard_server.threads import WorkThreads


@pytest.fixture
def admission(engine: Any, metrics: Any) -> LoadLimiter:
    return LoadLimiter(engine, FairQueue(engine, metrics, slots=2), metrics, max_queue=4, max_slots=2)


def refused(metrics: Any, reason: str) -> float:
    return float(metrics.refusals.labels(reason)._value.get())


def test_a_full_queue_is_refused_and_counted(admission: LoadLimiter, engine: Any, metrics: Any) -> None:
    engine.waiting = 3
    with admission.admit(LOCAL):
        pass
    engine.waiting = 4
    with pytest.raises(Overloaded, match="4 requests are waiting") as caught, admission.admit(LOCAL):
        pass
    assert SHORTEST_RETRY_S <= caught.value.retry_after_s <= 1.5 * LONGEST_RETRY_S
    assert refused(metrics, "queue_full") == 1


def test_a_burst_is_refused_before_the_engine_knows_of_it(admission: LoadLimiter, engine: Any) -> None:
    assert engine.waiting == 0
    with ExitStack() as burst:
        for _ in range(4 + 2):
            burst.enter_context(admission.admit(LOCAL))
        with pytest.raises(Overloaded), admission.admit(LOCAL):
            pass
    with admission.admit(LOCAL):
        pass


def test_those_who_do_not_read_take_no_room(admission: LoadLimiter) -> None:
    with ExitStack() as burst:
        for _ in range(4 + 2):
            burst.enter_context(admission.admit(LOCAL))
        assert admission.unread.enter(LOCAL)
        with admission.admit(LOCAL):
            pass
        admission.unread.leave(LOCAL)
        with pytest.raises(Overloaded), admission.admit(LOCAL):
            pass


async def test_a_burst_of_one_caller_that_waits_to_be_tokenised_gives_way(engine: Any, metrics: Any) -> None:
    prompts, release = WorkThreads("prompts", 1, 100), threading.Event()
    queue = FairQueue(engine, metrics, slots=2)
    admission = LoadLimiter(engine, queue, metrics, max_queue=4, max_slots=2, prompts=prompts)

    async def tokenised(name: str) -> None:
        caller = Caller(name, frozenset())
        with admission.admit(caller):
            await prompts.run(Call("id", inf, caller), lambda _: release.wait(10))

    greedy = [asyncio.create_task(tokenised("greedy")) for _ in range(4 + 2)]
    await asyncio.sleep(0.05)
    with pytest.raises(Overloaded):
        await tokenised("greedy")
    modest = asyncio.create_task(tokenised("modest"))
    await asyncio.sleep(0.05)
    release.set()
    await modest
    ends = await asyncio.gather(*greedy, return_exceptions=True)
    assert [type(end) for end in ends].count(Overloaded) == 1


def test_what_waits_is_bounded_for_each_and_in_all_but_everybody_may_have_a_few() -> None:
    waiting = Waiting(most_each=6, most=8)
    one, other, third = (Caller(name, frozenset()) for name in ("one", "other", "third"))
    assert [waiting.enter(one) for _ in range(7)] == [True] * 6 + [False]
    assert [waiting.enter(other) for _ in range(FEW + 1)] == [True] * FEW + [False]
    with pytest.raises(Overloaded), waiting.hold(one, "something"):
        pass
    with waiting.hold(third, "something"):
        assert waiting.total == 6 + FEW + 1
    waiting.leave(one)
    waiting.leave(one)
    waiting.leave(one)
    assert waiting.enter(other)


def test_an_engine_that_is_not_ready_refuses(admission: LoadLimiter, engine: Any, metrics: Any) -> None:
    engine.ready = False
    with pytest.raises(Unavailable) as caught, admission.admit(LOCAL):
        pass
    assert caught.value.retry_after_s
    assert refused(metrics, "not_ready") == 1


def test_leaving_still_takes_requests_and_closing_does_not(admission: LoadLimiter, metrics: Any) -> None:
    admission.start_draining()
    with admission.rpc():
        assert admission.is_draining
    admission.close()
    with pytest.raises(Unavailable), admission.rpc():
        pass
    assert refused(metrics, "draining") == 1


async def test_idle_when_the_last_rpc_ends_however_it_ends(admission: LoadLimiter) -> None:
    assert await admission.idle(within_s=1)
    first = admission.rpc()
    first.__enter__()
    assert not await admission.idle(within_s=0.01)
    waiting = asyncio.create_task(admission.idle(within_s=1))
    with pytest.raises(RuntimeError), admission.rpc():
        raise RuntimeError
    await asyncio.sleep(0.01)
    assert not waiting.done()
    first.__exit__(None, None, None)
    assert await waiting


def test_a_slower_engine_asks_for_more_patience(engine: Any, metrics: Any) -> None:
    def asked(typical_s: float) -> float:
        admission = LoadLimiter(engine, FairQueue(engine, metrics, slots=2), metrics, max_queue=8, max_slots=2)
        admission._typical_s = typical_s
        return min(admission._retry_after_s() for _ in range(50))

    assert asked(0.01) < asked(2.0) < asked(1000.0) <= LONGEST_RETRY_S * 1.5
