"""Stopping: nothing that runs is lost, nothing new is taken, nobody who only watches holds it up."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from saeguard.v1 import generation_service_pb2 as pb
from saeguard.v1 import generation_service_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Caller:
    """A client with a stream that runs and a health Watch that is open."""

    def __init__(self, channel: grpc.aio.Channel, tokens: int) -> None:
        self.stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        self.parts = aiter(self.stub.GenerateStream(self.request(tokens)))
        kinds = (health_pb2.HealthCheckRequest.SerializeToString, health_pb2.HealthCheckResponse.FromString)
        self.check = channel.unary_unary("/grpc.health.v1.Health/Check", *kinds)
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch", *kinds)
        self.watch, self.left = (watch(health_pb2.HealthCheckRequest()) for _ in range(2))

    @staticmethod
    def request(tokens: int) -> pb.GenerateRequest:
        return pb.GenerateRequest(text="abc", sampling=pb.Sampling(max_new_tokens=tokens))

    async def liveness(self) -> int:
        return (await self.check(health_pb2.HealthCheckRequest(service="liveness"))).status


@asynccontextmanager
async def calling(app: Any, tokens: int) -> AsyncIterator[tuple[Caller, asyncio.Task[None]]]:
    serving = asyncio.create_task(app.serve_until_stopped())
    async with asyncio.timeout(20), grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        caller = Caller(channel, tokens)
        await anext(caller.parts)
        assert (await caller.watch.read()).status == SERVING
        assert (await caller.left.read()).status == SERVING
        # One of two watchers leaves; the other must still hear of the drain.
        caller.left.cancel()
        yield caller, serving
    if not serving.done():
        serving.cancel()


async def test_a_running_stream_finishes_and_an_open_watch_does_not_hold_it_up(app_with: Any, engine: Any) -> None:
    engine.step_s = 0.05
    async with app_with(server={"drain_s": 10.0}) as app, calling(app, 20) as (caller, serving):
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await caller.watch.read()).status == NOT_SERVING
        assert await caller.liveness() == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.stub.GenerateStream(caller.request(1)).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in str(caught.value.details())
        assert dict(caught.value.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "1000"
        parts = [part async for part in caller.parts]
        assert parts[-1].completion.usage.generated_tokens == 20
        await asyncio.wait_for(serving, 5)
        assert 0.5 < time.monotonic() - began < 6.0
    assert engine.is_stopped


async def test_the_last_replies_arrive_whole(app_with: Any, engine: Any, eventually: Any) -> None:
    engine.step_s = 0.1
    async with app_with() as app, calling(app, 3) as (caller, serving):
        engine.gate = asyncio.Event()
        request = pb.GenerateRequest(text="abc", sampling=pb.Sampling(max_new_tokens=3))
        replies = [asyncio.ensure_future(caller.stub.Generate(request)) for _ in range(64)]
        await eventually(lambda: engine.running == 65)
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: app._limiter.is_draining)
        engine.gate.set()
        assert [one.completion.usage.generated_tokens for one in await asyncio.gather(*replies)] == [3] * 64
        await asyncio.wait_for(serving, 5)


async def test_until_the_delay_is_over_new_requests_are_taken(app_with: Any, engine: Any) -> None:
    engine.step_s = 0.02
    async with app_with(server={"drain_delay_s": 0.5}) as app, calling(app, 10) as (caller, serving):
        os.kill(os.getpid(), signal.SIGINT)
        assert (await caller.watch.read()).status == NOT_SERVING
        await asyncio.sleep(0.3)
        late = [part async for part in caller.stub.GenerateStream(caller.request(2))]
        assert late[-1].HasField("completion")
        assert app._health._status[""] == NOT_SERVING
        await asyncio.wait_for(serving, 5)


async def test_what_does_not_finish_in_time_is_cut_off(app_with: Any, engine: Any) -> None:
    engine.step_s = 0.05
    async with app_with(server={"drain_s": 0.2}) as app, calling(app, 60) as (caller, serving):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in caller.parts:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await asyncio.wait_for(serving, 5)
    assert engine.running == 0


async def test_a_second_signal_stops_at_once(app_with: Any, engine: Any) -> None:
    engine.step_s = 0.05
    async with app_with(server={"drain_s": 60.0}) as app, calling(app, 60) as (_, serving):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert not serving.done()
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 5)
        assert time.monotonic() - began < 2
    assert engine.running == 0
