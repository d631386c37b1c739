"""More than a server can do: what is let in ends in time, the rest is refused at once and told when to come back."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import pytest_asyncio

from saeguard.v1 import generation_service_pb2 as pb
from saeguard_server.app import App
from support.engines import World, make_world
from support.served import serving
from support.server_process import server_process

pytestmark = pytest.mark.asyncio(loop_scope="module")
METHOD = "/saeguard.v1.GenerationService/Generate"
NEW = 40
SLOTS = 8
Outcome = Callable[[str, str, str], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("llama", tmp_path_factory.mktemp("llama"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(world: World) -> AsyncIterator[App]:
    async with serving(world, with_saes=False, max_slots=SLOTS) as app:
        yield app


@pytest.fixture(scope="module")
def address(app: App, is_full: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """For figures a process of its own: callers in this one take the server's time."""
    if not is_full:
        yield f"127.0.0.1:{app.port}"
        return
    with server_process(tmp_path_factory.mktemp("server"), engine={"max_slots": SLOTS}) as server:
        yield server.address


@dataclass
class Answers:
    complete: int = 0
    refused_s: list[float] = field(default_factory=list)
    retries_s: list[float] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


class Crowd:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call: Any = channel.unary_unary(
            METHOD,
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        self.answers = Answers()

    async def ask(self, within_s: float | None, new: int = NEW, *, ignore_eos: bool = True) -> None:
        request = pb.GenerateRequest(
            text=f"Once {random.randrange(1000)}",
            sampling=pb.Sampling(max_new_tokens=new, temperature=0.0, ignore_eos=ignore_eos),
        )
        began = time.monotonic()
        call = self._call(request, timeout=within_s)
        try:
            await call
            self.answers.complete += 1
        except grpc.aio.AioRpcError as err:
            if err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.answers.refused_s.append(time.monotonic() - began)
                trailers = dict(err.trailing_metadata() or ())
                self.answers.retries_s.append(int(trailers["grpc-retry-pushback-ms"]) / 1000)
            else:
                self.answers.others.append(err.code().name)

    async def closed_loop(self, seconds: float, streams: int) -> float:
        """Answers a second without deadlines."""
        until, began = time.monotonic() + seconds, time.monotonic()
        before = self.answers.complete

        async def keep_asking() -> None:
            while time.monotonic() < until:
                await self.ask(None)

        await asyncio.gather(*(keep_asking() for _ in range(streams)))
        return (self.answers.complete - before) / (time.monotonic() - began)


def channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)])


@pytest.mark.parametrize("load", [4.0, 10.0])
async def test_goodput_does_not_fall_with_the_load(address: str, load: float, is_full: bool, outcome: Outcome) -> None:
    """The short form looks at shapes only: callers share the server's process, and the machine may be busy."""
    if load > 4 and not is_full:
        pytest.skip("callers in the server's process take its time: --hostile has a server of its own")
    seconds = 10.0 if is_full else 2.5
    async with channel(address) as open_channel:
        await Crowd(open_channel).closed_loop(seconds / 4, 2 * SLOTS)
        capacity = await Crowd(open_channel).closed_loop(seconds / 2, 2 * SLOTS)
        crowd, within_s = Crowd(open_channel), 3 * SLOTS / capacity
        until, asked = time.monotonic() + seconds, set[asyncio.Task[None]]()
        while time.monotonic() < until:
            asked.add(asyncio.create_task(crowd.ask(within_s)))
            await asyncio.sleep(random.expovariate(load * capacity))
        complete = crowd.answers.complete
        await asyncio.gather(*asked)
    share = complete / (capacity * seconds)
    refused_s = statistics.median(crowd.answers.refused_s)
    outcome(
        f"{load:g} times what the server can do", ">= 0.9 of the capacity, refused within 50 ms",
        f"{share:.2f}, {1000 * refused_s:.0f} ms",
    )  # fmt: skip
    assert min(crowd.answers.retries_s) > 0
    assert share >= (0.9 if is_full else 0.02)
    assert refused_s < (0.05 if is_full else 0.5)
    assert not is_full or len(crowd.answers.others) <= 0.1 * len(asked)


async def test_lies_about_deadlines_and_lengths_cost_nothing(app: App, is_full: bool, outcome: Outcome) -> None:
    lies = 3000 if is_full else 300
    async with channel(f"127.0.0.1:{app.port}") as open_channel:
        honest, liar = Crowd(open_channel), Crowd(open_channel)
        await asyncio.gather(*(honest.ask(30.0) for _ in range(4)))
        steps = app.engine.pace.steps
        for _ in range(lies // 50):
            await asyncio.gather(*(liar.ask(0.002, new=2**31 - 1) for _ in range(50)))
        wasted = app.engine.pace.steps - steps
        await asyncio.gather(*(liar.ask(0.0005, new=1, ignore_eos=False) for _ in range(50)))
        before = honest.answers.complete
        await asyncio.gather(*(honest.ask(30.0) for _ in range(8)))
    outcome("deadlines of 2 ms for 2 billion tokens", "no steps, nothing spoilt", f"{wasted} steps for {lies} requests")
    assert honest.answers.complete - before == 8
    assert liar.answers.complete == 0
    assert wasted <= 0.05 * lies


async def test_a_deadline_that_nobody_can_meet_is_refused_by_name(app: App) -> None:
    async with channel(f"127.0.0.1:{app.port}") as open_channel:
        crowd = Crowd(open_channel)
        await crowd.ask(None, new=100)
        await crowd.ask(5 * app.engine.pace.step_s(1), new=100)
        await crowd.ask(None, new=100)
    assert (crowd.answers.complete, len(crowd.answers.refused_s)) == (2, 1)
