"""A deadline that passes while something is on its way out ends the RPC in order, and leaves gRPC's log empty."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from saeguard.results import StreamChunk
from saeguard.v1 import generation_service_pb2 as pb
from saeguard_server.caller import Call
from saeguard_server.errors import DeadlineExceeded

DEADLINE_S = 0.05


@pytest.fixture(params=["unary", "stream"])
def ask(running: Any, request: pytest.FixtureRequest) -> Any:
    """Asks in one form or the other; gives the error that ends the call within two seconds."""

    async def asked(timeout: float | None) -> grpc.aio.AioRpcError:
        if request.param == "unary":
            last = running.generation.Generate(pb.GenerateRequest(text="hi"), timeout=timeout)
        else:
            last = running.generation.GenerateStream(pb.GenerateRequest(text="hi"), timeout=timeout).read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(last, 2)
        return caught.value

    return asked


@pytest.fixture
def core_logs(caplog: pytest.LogCaptureFixture) -> Any:
    """What gRPC itself logged, a moment after the call."""

    async def logged() -> list[str]:
        await asyncio.sleep(0.05)
        return [record.getMessage() for record in caplog.records if record.name.startswith("grpc")]

    return logged


async def test_the_servers_deadline_on_the_headers_reaches_the_caller(running: Any, ask: Any, core_logs: Any) -> None:
    real = running.generate.stream

    async def held(*asked: Any) -> AsyncIterator[StreamChunk]:
        async for chunk in real(*asked):
            # Holds the event loop until the time is over: the deadline's turn comes when the headers have just begun.
            time.sleep(DEADLINE_S)
            yield chunk

    running.generate.stream = held
    running.interceptor.max_deadline_s = DEADLINE_S
    error = await ask(None)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details() == "the time allowed for this request is over"
    assert await core_logs() == []


async def test_the_callers_deadline_is_left_to_the_core(running: Any, ask: Any, core_logs: Any) -> None:
    async def just_before(_: Any, call: Call) -> AsyncIterator[StreamChunk]:
        await asyncio.sleep(call.deadline - time.monotonic() - 0.004)
        raise DeadlineExceeded("an answer that would race with the core's")
        yield

    running.generate.stream = just_before
    error = await ask(0.1)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "race" not in error.details()
    assert await core_logs() == []
