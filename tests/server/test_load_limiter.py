"""Admission: what is refused, what it says, and when the server is idle."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest

from saeguard_server.admission import LONGEST_RETRY_S, SHORTEST_RETRY_S, FairQueue, LoadLimiter
from saeguard_server.caller import LOCAL
from saeguard_server.errors import Overloaded, Unavailable


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
