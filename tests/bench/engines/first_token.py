"""How long a short prompt waits for its first token, while others generate and a long prompt arrives."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from bench.engines.requests import generation
from bench.work import edits, prompt

if TYPE_CHECKING:
    from bench.engines.own import Own

OTHERS, SHORT, LONG = 31, 16, 2000
ENDLESS = 1500
"""Tokens that the others would generate; they are cancelled before."""


async def probe(own: Own, seed: int, probes: int) -> dict[str, list[float]]:
    """Seconds to the first token of short prompts, one after the other, 31 others generating under edits of their own.

    A third of the way a prompt of 2,000 tokens arrives; ``quiet`` came before that and after its first token,
    ``crowded`` while it was read.
    """
    began = [asyncio.Event() for _ in range(OTHERS)]
    others = [
        asyncio.create_task(own.times(generation(prompt(SHORT, f"{seed}.{one}"), ENDLESS, edits(one, "own")), event))
        for one, event in enumerate(began)
    ]
    found: dict[str, list[float]] = {"quiet": [], "crowded": []}
    long: asyncio.Task[list[float]] | None = None
    try:
        await asyncio.gather(*(event.wait() for event in began))
        for number in range(probes):
            if number == probes // 3:
                long = asyncio.create_task(own.times(generation(prompt(LONG, f"{seed}.long"), 1, [])))
            crowded = long is not None and not long.done()
            found["crowded" if crowded else "quiet"].append(await _one(own, f"{seed}.short{number}"))
        if long is not None:
            await long
    finally:
        for one in others:
            one.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return found


async def _one(own: Own, seed: str) -> float:
    start = time.perf_counter()
    came = await own.times(generation(prompt(SHORT, seed), 1, []))
    return came[0] - start
