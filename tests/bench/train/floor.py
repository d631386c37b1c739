"""What a step cannot do without, each part alone: one encoder product, a look at every result, a gather, Adam.

The product is torch's, in bfloat16, float32 or 8-bit integers, whichever is fastest on this processor. No gradient, no
auxiliary loss, no bookkeeping: nobody trains in this time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from bench.train.plan import Plan, Pool
from bench.train.side import middle
from bench.worker import serve

ROWS = 256
"""Tokens of one product: few enough that its results are still in the cache when they are looked at."""


class Floor:
    """The four parts, ready to be timed."""

    def start(self, **plan: Any) -> int:
        """Sizes and threads; the numbers do not matter."""
        asked = Plan(**{**plan, "widths": ()})
        torch.set_num_threads(asked.threads)
        generator = torch.Generator().manual_seed(1)
        pool = Pool(asked.pool)
        x = pool.train[: asked.batch]
        product = fastest(x, torch.randn(asked.d_sae, pool.d_in, generator=generator))
        weights = [torch.nn.Parameter(torch.randn(asked.d_sae, pool.d_in, generator=generator)) for _ in range(2)]
        for one in weights:
            one.grad = torch.randn(one.shape, generator=generator)
        adam = torch.optim.Adam(weights, lr=1e-4, fused=True)
        index = torch.randint(asked.d_sae, (asked.batch, asked.k), generator=generator)
        values = torch.rand(index.shape, generator=generator)
        threshold = torch.tensor(2.0 * pool.d_in**0.5, dtype=torch.bfloat16)
        self._parts: dict[str, Callable[[], object]] = {
            "product": product,
            "selection": _Look(asked.d_sae, len(x) // ROWS, threshold, generator),
            "decode": lambda: embedding_bag(index, weights[1].data, per_sample_weights=values, mode="sum"),
            "optimiser": adam.step,
        }
        self._seconds: dict[str, list[float]] = {name: [] for name in self._parts}
        return pool.d_in

    @torch.no_grad()
    def train(self, steps: int) -> list[float]:
        """Seconds of all parts together, ``steps`` times."""
        found = [{name: _timed(part) for name, part in self._parts.items()} for _ in range(steps)]
        for one in found:
            for name, seconds in one.items():
                self._seconds[name].append(seconds)
        return [sum(one.values()) for one in found]

    def score(self) -> dict[str, float]:
        """Milliseconds of each part, all rounds."""
        return {f"{name}_ms": 1e3 * middle(seconds) for name, seconds in self._seconds.items()}


class _Look:
    """Compares every result with a threshold, a cache full at a time: less than any selection can do."""

    def __init__(self, d_sae: int, times: int, threshold: Tensor, generator: torch.Generator) -> None:
        self._results = torch.randn(ROWS, d_sae, generator=generator).bfloat16()
        self._above = torch.empty(ROWS, d_sae, dtype=torch.bool)
        self._times, self._threshold = times, threshold

    def __call__(self) -> None:
        for _ in range(self._times):
            torch.gt(self._results, self._threshold, out=self._above)


def fastest(x: Tensor, encoder: Tensor) -> Callable[[], object]:
    """The product of x [tokens, d_in] and encoder [d_sae, d_in] in the precision that takes ``ROWS`` tokens fastest."""
    kinds = (
        (linear, x.bfloat16(), encoder.bfloat16()),
        (linear, x, encoder),
        (torch._int_mm, x.sign().char(), encoder.sign().char().T),
    )
    product, rows, weights = min(kinds, key=lambda kind: min(_timed(partial(_first, *kind)) for _ in range(3)))
    return lambda: [product(some, weights) for some in rows.split(ROWS)]


def _first(product: Callable[[Tensor, Tensor], Tensor], rows: Tensor, weights: Tensor) -> None:
    product(rows[:ROWS], weights)


def _timed(part: Callable[[], object]) -> float:
    start = time.perf_counter()
    part()
    return time.perf_counter() - start


if __name__ == "__main__":
    floor = Floor()
    asyncio.run(serve({"start": floor.start, "train": floor.train, "score": floor.score}))
