"""The child's side of a benchmark: a process that does one thing after another as it is told, a JSON line each.

Replies go through a pipe of their own: libraries print what they like.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

REPLIES = "BENCH_REPLIES"
"""Environment variable with the number of the pipe."""


async def serve(ops: Mapping[str, Callable[..., Any]]) -> None:
    """Says that it is ready, then answers ``{"op": name, ...arguments}`` until its standard input ends."""
    with os.fdopen(int(os.environ[REPLIES]), "w", encoding="utf-8", closefd=False) as replies:
        _say(replies, {"ok": sorted(ops)})
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            try:
                found = ops[asked.pop("op")](**asked)
                _say(replies, {"ok": await found if inspect.isawaitable(found) else found})
            except Exception as err:
                traceback.print_exc()
                _say(replies, {"error": f"{type(err).__name__}: {err}"})


def _say(replies: Any, value: dict[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()
