"""Many streams at once, some cancelled at random: every survivor complete, every slot free, memory flat."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from saeguard_client import AsyncClient, Clamp, Scale
from support.engines import prompt
from support.served import ENGINE, idle, metric

pytestmark = pytest.mark.asyncio(loop_scope="session")

STREAMS = int(os.environ.get("SAEGUARD_SOAK_STREAMS", "64"))
SECONDS = float(os.environ.get("SAEGUARD_SOAK_SECONDS", "6"))
NEW = 20
GROWTH_MIB = 64 if ENGINE == "vllm" else 24
"""vLLM has two processes more, which still settle in a run of seconds."""


def resident_mib() -> float:
    """Memory of server and client together, and of the processes that an engine has."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in _family(os.getpid()))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _family(pid: int) -> Iterator[int]:
    yield pid
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # threads come and go
            for child in (thread / "children").read_text().split():
                yield from _family(int(child))


async def one_stream(client: AsyncClient, index: int, chosen: random.Random) -> str:
    """What became of one stream: complete or cancelled."""
    steer: list[Any] = [Clamp("resid_post", index % 90, 3.0), Scale("attn_z", index % 50, 2.0)][: index % 3]
    cancel_at = chosen.randrange(1, NEW) if chosen.random() < 1 / 3 else None
    tokens = 0
    stream = client.generate_stream(
        prompt(index, 4 + index % 30), steer=steer, max_new_tokens=NEW, temperature=1.0, seed=index, ignore_eos=True
    )
    async for chunk in stream:
        tokens += len(chunk.tokens)
        if cancel_at is not None and tokens >= cancel_at:
            await stream.aclose()
            return "cancelled"
        if chunk.completion is not None:
            assert tokens == NEW
            assert (chunk.completion.receipt is not None) == bool(steer)
            return "complete"
    raise AssertionError("a stream ended without a completion")


async def test_streams_come_and_go_and_nothing_leaks(served: Any) -> None:
    counts = {"complete": 0, "cancelled": 0}
    memory: list[float] = []
    async with AsyncClient(served.address) as client:
        end = time.monotonic() + SECONDS

        async def caller(number: int) -> None:
            chosen, index = random.Random(number), number
            while time.monotonic() < end:
                counts[await one_stream(client, index, chosen)] += 1
                index += STREAMS

        async def watcher() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(SECONDS / 12)
                gc.collect()
                memory.append(resident_mib())

        await asyncio.gather(watcher(), *(caller(number) for number in range(STREAMS)))
        await idle(served.app)
        assert metric(served.app, "saeguard_slots_in_use") == 0
        assert metric(served.app, "saeguard_queue_length") == 0
        assert metric(served.app, "saeguard_engine_restarts_total") == 0
    assert counts["complete"] > STREAMS
    assert counts["cancelled"] > STREAMS / 8
    # After the first third everything that is allocated once is there.
    settled, last = memory[len(memory) // 3], memory[-1]
    assert last - settled < GROWTH_MIB, f"memory grew: {memory}"
