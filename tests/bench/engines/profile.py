"""Where a step goes, while so many requests generate under edits of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.engines.parts import Recorder, full, split
from bench.work import batch

if TYPE_CHECKING:
    from bench.engines.own import Own

_recorder: list[Recorder] = []


async def measure(own: Own, requests: int, new: int, seed: int) -> dict[str, float]:
    """Seconds per step of each part. From the first call on, everything in this process is recorded."""
    if not _recorder:
        _recorder.append(Recorder())
    _recorder[0].steps.clear()
    await own.together(**batch(requests, new, seed, "own"))
    return split(full(_recorder[0].steps, requests))
