"""Work of callers in threads of its own: bounded, fair, left when nobody waits, and no hindrance at the end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from saeguard_server import threads
from saeguard_server.caller import Call, Caller
from saeguard_server.errors import Cancelled, DeadlineExceeded, Overloaded
from saeguard_server.threads import Cancellation, WorkThreads


def call(name: str = "local", within_s: float = 30.0) -> Call:
    return Call("id", time.monotonic() + within_s, Caller(name, frozenset()))


class Gate:
    """Work that waits to be let go."""

    def __init__(self) -> None:
        self.open, self.running, self.most = threading.Event(), 0, 0
        self.order: list[str] = []

    def work(self, name: str) -> str:
        self.running += 1
        self.most = max(self.most, self.running)
        self.order.append(name)
        self.open.wait(10)
        self.running -= 1
        return name


async def begun(gate: Gate, number: int) -> None:
    async with asyncio.timeout(5):
        while len(gate.order) < number:
            await asyncio.sleep(0.001)


async def test_no_more_threads_than_stated_and_one_caller_after_the_other() -> None:
    pool, gate = WorkThreads("test", 2, 100), Gate()
    tasks = [asyncio.create_task(pool.run(call("many"), lambda _: gate.work("many"))) for _ in range(10)]
    await begun(gate, 2)
    tasks.append(asyncio.create_task(pool.run(call("single"), lambda _: gate.work("single"))))
    await asyncio.sleep(0)
    gate.open.set()
    assert await asyncio.gather(*tasks) == ["many"] * 10 + ["single"]
    assert gate.most == 2
    assert gate.order.index("single") <= 4


async def test_what_is_raised_is_raised_and_the_thread_goes_on() -> None:
    pool = WorkThreads("steady", 1, 10)

    def fails(_: Cancellation) -> None:
        raise KeyError("x")

    for _ in range(3):
        with pytest.raises(KeyError):
            await pool.run(call(), fails)
    assert await pool.run(call(), lambda _: threading.current_thread().name) == "steady"
    assert sum(thread.name == "steady" for thread in threading.enumerate()) == 1


async def test_too_much_waiting_is_refused_at_the_cost_of_whoever_has_most() -> None:
    pool, gate = WorkThreads("test", 1, 3), Gate()
    many = [asyncio.create_task(pool.run(call("many"), lambda _: gate.work("many"))) for _ in range(4)]
    await begun(gate, 1)
    with pytest.raises(Overloaded):
        await pool.run(call("many"), lambda _: gate.work("many"))
    single = asyncio.create_task(pool.run(call("single"), lambda _: gate.work("single")))
    await asyncio.sleep(0)
    gate.open.set()
    assert await single == "single"
    results = await asyncio.gather(*many, return_exceptions=True)
    assert [type(result) for result in results] == [str, str, str, Overloaded]


async def test_work_of_a_caller_who_is_gone_or_late_is_not_begun_and_stops() -> None:
    pool, gate = WorkThreads("test", 1, 10), Gate()
    ends: list[BaseException] = []

    def polls(cancellation: Cancellation) -> None:
        gate.order.append("polls")
        try:
            while True:
                cancellation.check()
                time.sleep(0.001)
        except BaseException as err:
            ends.append(err)
            raise

    running = asyncio.create_task(pool.run(call(), polls))
    await begun(gate, 1)
    waiting = asyncio.create_task(pool.run(call(), lambda _: gate.work("cancelled")))
    late = asyncio.create_task(pool.run(call(within_s=-1), lambda _: gate.work("late")))
    await asyncio.sleep(0)
    waiting.cancel()
    running.cancel()
    with pytest.raises(DeadlineExceeded):
        await late
    assert await pool.run(call(), lambda _: 7) == 7
    assert gate.order == ["polls"]
    assert isinstance(ends[0], Cancelled)
    with pytest.raises(DeadlineExceeded):
        await pool.run(call(within_s=0.05), polls)


async def test_a_thread_that_has_nothing_to_do_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "IDLE_S", 0.02)
    pool = WorkThreads("brief", 1, 10)
    for _ in range(2):
        assert await pool.run(call(), lambda _: 7) == 7
        async with asyncio.timeout(5):
            while any(thread.name == "brief" for thread in threading.enumerate()):
                await asyncio.sleep(0.01)


def test_a_process_ends_while_such_work_runs() -> None:
    program = """
import asyncio, time
from saeguard_server.caller import Call
from saeguard_server.threads import WorkThreads
async def main():
    pool = WorkThreads("test", 1, 1)
    running = asyncio.create_task(pool.run(Call("id", time.monotonic() + 60), lambda _: time.sleep(60)))
    await asyncio.sleep(0.1)
asyncio.run(main())
"""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    assert time.monotonic() - began < 20
