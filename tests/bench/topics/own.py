"""Figures of the embedded engine alone: one request, many configurations, edits, the first token."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator

from bench.options import Options
from bench.report import Line, figure, skipped
from bench.roster import Absent, Pool
from bench.rounds import interleave
from bench.topics.throughput import EMBEDDED
from bench.work import FACTS, batch

SHORT_PASSES = "embedded, 64 prompt tokens a step"
MANY, FEW_NEW = 256, 12
PROBES = 90
SMALL, LARGE = 4096, 131_072
_FEWER = 3
"""Rounds of what takes long; of the others, as many as were asked for."""


def single(pool: Pool, options: Options) -> Iterator[Line]:
    """How near one request alone comes to the time that reading every weight once takes."""
    size = json.loads((pool.folder / FACTS).read_text())["read_bytes"]

    def reads(turn: int) -> float:
        return float(size / pool.ask(EMBEDDED, "step", **batch(1, options.new, 50_000 + turn)) / 1e9)

    found = interleave(
        {"weights read": reads, "memory read": lambda _: pool.ask("memory", "bandwidth") / 1e9}, options.rounds
    )
    name = "embedded engine, one request: share of the memory bandwidth"
    yield found.compare(name, "GB/s", "weights read", "memory read", ">= 0.7")


def configurations(pool: Pool, options: Options) -> Iterator[Line]:
    """Everybody under edits of their own against everybody under the same."""
    found = interleave(
        {
            "own edits": lambda turn: pool.ask(EMBEDDED, "batch", **batch(MANY, FEW_NEW, 60_000 + turn, "own")),
            "the same edits": lambda turn: pool.ask(EMBEDDED, "batch", **batch(MANY, FEW_NEW, 70_000 + turn, "same")),
        },
        min(options.rounds, _FEWER),
    )
    yield found.compare(
        "256 configurations in a batch against one", "tokens/s", "own edits", "the same edits", ">= 0.90"
    )


def dictionary(pool: Pool, options: Options) -> Iterator[Line]:
    """One step's edits in a small dictionary and in a large one."""
    found = interleave(
        {
            f"{size // 1024}k features": lambda _, size=size: 1000 * pool.ask("edit table", "cost", d_sae=size)  # type: ignore[misc]
            for size in (LARGE, SMALL)
        },
        2 * options.rounds,
    )
    name = "edits of a step, 128k features against 4k"
    yield found.compare(name, "ms", "128k features", "4k features", "<= 1.2")
    pool.stop("edit table")


def first_token(pool: Pool, options: Options) -> Iterator[Line]:
    """The slowest first token of a short prompt against the usual one, while 31 generate and a long prompt arrives."""
    for worker in (EMBEDDED, SHORT_PASSES):
        yield _first_token(pool, options, worker)
    pool.stop(SHORT_PASSES)


def _first_token(pool: Pool, options: Options, worker: str) -> Line:
    name, target = f"{worker}: first token of a short prompt, 99th percentile against median", "<= 3"
    quiet: list[float] = []
    crowded: list[float] = []
    try:
        for turn in range(min(options.rounds, _FEWER) + 1):
            found = pool.ask(worker, "first_token", seed=80_000 + turn, probes=PROBES)
            if turn:
                quiet += [1000 * one for one in found["quiet"]]
                crowded += [1000 * one for one in found["crowded"]]
    except Absent as err:
        return skipped(name, target, str(err))
    every = quiet + crowded
    more = {
        "probes": len(every),
        "while the long prompt was read": len(crowded),
        "median before and after": round(statistics.median(quiet), 1),
        "median while it was read": round(statistics.median(crowded), 1) if crowded else None,
        "slowest": round(max(every), 1),
    }
    p99, median = statistics.quantiles(every, n=100, method="inclusive")[98], statistics.median(every)
    return figure(name, "ms", [p99], [median], sides=("99th percentile", "median"), target=target, more=more)
