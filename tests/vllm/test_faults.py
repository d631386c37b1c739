"""What a death of vLLM's processes does to the requests that ran, and to those that come after."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil
import pytest

from saeguard.types import Clamp
from saeguard_server.errors import Unavailable
from support import reference, vllm
from support.engines import World, greedy, prompt
from support.models import BOS, EOS, PAD

pytestmark = [pytest.mark.asyncio, pytest.mark.filterwarnings("default")]
RESTART_S = 120.0


async def test_a_dead_worker_fails_its_requests_and_comes_back(llama: World) -> None:
    with vllm.running(vllm.served(llama)) as one:
        await _until(one.engine.is_ready)
        steer = (Clamp("resid_post", 4, 4.0),)
        running = [asyncio.create_task(one.ask(greedy(prompt(i, 20), 100, interventions=steer))) for i in range(3)]
        await asyncio.sleep(0.2)
        os.kill(_worker(), signal.SIGKILL)
        for result in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(result, Unavailable)
            assert result.retry_after_s is not None
        assert not one.engine.is_ready()
        with pytest.raises(Unavailable):
            await one.ask(greedy(prompt(1, 20), 2))
        await _until(one.engine.is_ready)
        assert one.engine._metrics.engine_restarts._value.get() == 1
        again = await one.ask(greedy(prompt(5, 20), 6))
        assert again.ids == reference.generate(llama.model, prompt(5, 20), 6, [], {BOS, EOS, PAD}).tokens
        late = asyncio.create_task(one.ask(greedy(prompt(1, 20), 100)))
        await asyncio.sleep(0.1)
    with pytest.raises(Unavailable):
        await late


def _worker() -> int:
    """The process that runs the model: vLLM's core starts it."""
    return next(one.pid for one in psutil.Process().children(recursive=True) if "Worker" in " ".join(one.cmdline()))


async def _until(condition) -> None:  # type: ignore[no-untyped-def]
    ends = time.monotonic() + RESTART_S
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.05)
