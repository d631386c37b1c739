"""An engine of ours as a worker: requests go through the flow that the server uses, without a wire."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from bench.engines import first_token, profile
from bench.engines.requests import generation, settings
from bench.work import batch, tokens
from bench.worker import serve
from saeguard.requests import GenerateRequest
from saeguard_server.admission import Admission
from saeguard_server.caller import Call
from saeguard_server.engine import load_engine
from saeguard_server.generation import Generation
from saeguard_server.observe import Metrics

DEADLINE_S = 300.0


class Own:
    """A started engine.

    Args:
        engine: as ``load_engine`` gives it.
        limits: of the settings.
    """

    def __init__(self, engine: Any, limits: Any) -> None:
        self.engine = engine
        self._flow = Generation(
            engine, engine.tokenizer, limits, Admission(engine, Metrics(CollectorRegistry()), 2**31)
        )

    async def times(self, request: GenerateRequest, began: asyncio.Event | None = None) -> list[float]:
        """When each token came, in seconds of ``time.perf_counter``; ``began`` is set when the first has."""
        came: list[float] = []
        async for chunk in self._flow.stream(request, Call("bench", time.monotonic() + DEADLINE_S)):
            came += [time.perf_counter()] * len(chunk.tokens)
            if came and began is not None:
                began.set()
        return came

    async def together(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Tokens per second of all requests at once."""
        start = time.perf_counter()
        asked = [generation(one, new, steer) for one, steer in zip(prompts, edits, strict=True)]
        await asyncio.gather(*(self.times(one) for one in asked))
        return tokens(prompts, new) / (time.perf_counter() - start)

    async def one_by_one(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Tokens per second, each request when the one before it is over."""
        start = time.perf_counter()
        for one, steer in zip(prompts, edits, strict=True):
            await self.times(generation(one, new, steer))
        return tokens(prompts, new) / (time.perf_counter() - start)

    async def step(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Seconds from token to token of one request alone."""
        came = await self.times(generation(prompts[0], new, edits[0]))
        return (came[-1] - came[0]) / (len(came) - 1)

    async def warm(self) -> float:
        """Passes of every kind, for whatever is compiled when it is first met; returns the seconds that took."""
        start = time.perf_counter()
        for count in (1, 2, 32):
            await self.together(**batch(count, 4, count))
            await self.together(**batch(count, 4, count, "own"))
        return time.perf_counter() - start


async def main() -> None:
    """Loads, and serves the benchmark."""
    args = _arguments()
    more = {"prefill_tokens": args.prefill_tokens} if args.prefill_tokens else {}
    chosen = settings(args.folder, args.dtype, args.compile, args.slots, args.kind, **more)
    engine = load_engine(chosen, Metrics(CollectorRegistry()))
    engine.start()
    own = Own(engine, chosen.limits)
    ops: dict[str, Callable[..., float | Awaitable[Any]]] = {
        "warm": own.warm,
        "batch": own.together,
        "one_by_one": own.one_by_one,
        "step": own.step,
        "first_token": lambda **asked: first_token.probe(own, **asked),
        "profile": lambda **asked: profile.measure(own, **asked),
    }
    try:
        await serve(ops)
    finally:
        engine.stop()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("--kind", required=True)
    parser.add_argument("--compile", required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--prefill-tokens", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())
