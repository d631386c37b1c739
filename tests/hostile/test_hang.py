"""Steps that never end: a stopped worker process is replaced, an embedded engine says that only a restart helps."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from saeguard_client import AsyncClient, SaeguardError, Unavailable
from saeguard_server.app import App
from support.engines import World, make_world
from support.served import serving

STEP_TIMEOUT_S = 1.0
Outcome = Callable[[str, str, str], None]


class Server(NamedTuple):
    app: App
    client: AsyncClient
    is_serving: Callable[[str], Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("llama", tmp_path_factory.mktemp("llama"))


@asynccontextmanager
async def served(world: World, **engine: Any) -> AsyncIterator[Server]:
    engine = {"step_timeout_s": STEP_TIMEOUT_S, "max_context": 2048} | engine
    async with (
        serving(world, with_saes=False, **engine) as app,
        AsyncClient(f"127.0.0.1:{app.port}", retries=0) as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)

        async def is_serving(service: str) -> bool:
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

        yield Server(app, client, is_serving)


async def failure(client: AsyncClient) -> SaeguardError:
    """How a long generation ends."""
    with pytest.raises(SaeguardError) as caught:
        await client.generate("Once", max_new_tokens=1900, ignore_eos=True, deadline_s=60)
    return caught.value


async def answer(client: AsyncClient, within_s: float) -> str:
    async with asyncio.timeout(within_s):
        while True:
            try:
                return (await client.generate("Once", max_new_tokens=4, seed=1, deadline_s=30)).text
            except Unavailable:
                await asyncio.sleep(0.2)


async def test_a_stopped_worker_is_replaced(world: World, outcome: Outcome) -> None:
    async with served(world, process=True) as (app, client, is_serving):
        before = await answer(client, 20)
        running = [asyncio.create_task(failure(client)) for _ in range(3)]
        await asyncio.sleep(0.15)
        pid = app.engine.pid  # type: ignore[attr-defined]
        stopped = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        errors = await asyncio.wait_for(asyncio.gather(*running), 10 * STEP_TIMEOUT_S)
        told_s = time.monotonic() - stopped
        for error in errors:
            assert isinstance(error, Unavailable)
            assert error.retry_after_s is not None
        assert await is_serving("liveness"), "it comes back by itself"
        assert await answer(client, 60) == before
        assert app.engine.pid != pid  # type: ignore[attr-defined]
        await asyncio.sleep(0.5)
        assert await is_serving("")
    outcome("SIGSTOP to the engine's process", "told within 4 step timeouts", f"told in {told_s:.1f} s")
    assert told_s < 4 * STEP_TIMEOUT_S


async def test_an_embedded_engine_that_hangs_loses_liveness_and_has_it_back_where_the_step_ends(
    world: World, outcome: Outcome
) -> None:
    async with served(world) as (app, client, is_serving):
        await answer(client, 20)
        goes_on, runner = threading.Event(), app.engine._core.runner  # type: ignore[attr-defined]
        forward = runner.forward

        def hangs(batch: Any) -> Any:
            goes_on.wait(60)
            return forward(batch)

        runner.forward = hangs
        began = time.monotonic()
        try:
            error = await asyncio.wait_for(failure(client), 10 * STEP_TIMEOUT_S)
            told_s = time.monotonic() - began
            assert isinstance(error, Unavailable)
            assert error.retry_after_s is not None
            await asyncio.sleep(0.5)
            assert not await is_serving("")
            assert not await is_serving("liveness")
            with pytest.raises(Unavailable):
                await client.generate("Once", max_new_tokens=1)
        finally:
            goes_on.set()
        runner.forward = forward
        assert await answer(client, 20)
        await asyncio.sleep(0.5)
        assert await is_serving("liveness")
    outcome("a step of the embedded engine hangs", "requests told, liveness goes", f"told in {told_s:.1f} s")


async def test_slow_first_steps_of_a_size_and_many_slow_steps_are_no_hang(world: World) -> None:
    async with served(world, prefill_tokens=64) as (app, client, is_serving):
        runner = app.engine._core.runner  # type: ignore[attr-defined]
        forward, sizes = runner.forward, set[int]()

        def compiles(batch: Any) -> Any:
            time.sleep(0.2 if batch.tokens.bit_length() in sizes else 2.2 * STEP_TIMEOUT_S)
            sizes.add(batch.tokens.bit_length())
            return forward(batch)

        runner.forward = compiles
        long_prompt = "an old farmer " * 17
        reply = await client.generate(long_prompt, max_new_tokens=3, ignore_eos=True, deadline_s=60)
        assert len(reply.tokens) == 3
        assert await is_serving("liveness")
