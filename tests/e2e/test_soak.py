"""Many streams at once, some cancelled at random: every survivor complete, every slot free, memory flat."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from pathlib import Path
from typing import Any

from saeguard_client import AsyncClient, Clamp, Scale
from support.engines import World, make_world, prompt
from support.served import idle, metric, serving

STREAMS = int(os.environ.get("SAEGUARD_SOAK_STREAMS", "64"))
SECONDS = float(os.environ.get("SAEGUARD_SOAK_SECONDS", "6"))
NEW = 20


def resident_mib() -> float:
    """Memory of this process, server and client together."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


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


async def test_streams_come_and_go_and_nothing_leaks(tmp_path: Path) -> None:
    world: World = make_world("llama", tmp_path)
    counts = {"complete": 0, "cancelled": 0}
    memory: list[float] = []
    async with serving(world, max_slots=16) as app, AsyncClient(f"127.0.0.1:{app.port}") as client:
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
        await idle(app)
        assert metric(app, "saeguard_slots_in_use") == 0
        assert metric(app, "saeguard_queue_length") == 0
        assert metric(app, "saeguard_engine_restarts_total") == 0
    assert counts["complete"] > STREAMS
    assert counts["cancelled"] > STREAMS / 8
    # After the first third everything that is allocated once is there.
    settled, last = memory[len(memory) // 3], memory[-1]
    assert last - settled < 24, f"memory grew: {memory}"
