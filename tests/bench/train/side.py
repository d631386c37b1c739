"""A side of the benchmark in a process of its own: trains as many steps as it is told, and says how long each took."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.train.plan import Plan, Pool, unexplained
from bench.worker import serve

MIB = 2**20


class Enough(Exception):
    """Raised into a library's own loop that asks for a batch more than it should train."""


class Batches:
    """``steps`` batches, then ``Enough``; notes when each was asked for."""

    def __init__(self, source: Iterator[Tensor], steps: int) -> None:
        self.steps = steps
        self.asked: list[float] = []
        self._source = source

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        self.asked.append(time.perf_counter())
        if len(self.asked) > self.steps:
            raise Enough
        return next(self._source)


class Trainer(Protocol):
    """A library's trainer: the loop is its own where it has one that takes activations."""

    def train(self, batches: Batches) -> None:
        """Until ``Enough``, which it may let out."""
        ...

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [tokens, d_sae] and reconstruction [tokens, d_in], as they are once it is saved."""
        ...

    def decoder(self) -> Tensor:
        """[d_sae, d_in]."""
        ...


Maker = Callable[[Plan, Pool], Trainer]


class Side:
    """What a worker answers to."""

    def __init__(self, make: Maker) -> None:
        self._make = make
        self._trainer: Trainer | None = None
        self._path, self._pool = "", None

    def start(self, **plan: Any) -> int:
        """Begins anew; returns the width of the activations."""
        self._trainer = None
        gc.collect()
        give_back()
        asked = Plan(**{**plan, "widths": tuple(plan.get("widths", ()))})
        torch.set_num_threads(asked.threads)
        if self._path != asked.pool:
            self._path, self._pool = asked.pool, Pool(asked.pool)
        self._held = memory("VmRSS")
        forget_peak()
        self._trainer = self._make(asked, self._pool)
        self._batches = self._pool.batches(asked.batch)
        self._steps = 0
        return self._pool.d_in

    def train(self, steps: int) -> list[float]:
        """Seconds of every step."""
        batches = Batches(self._batches, steps)
        with suppress(Enough):
            self._trainer.train(batches)
        if len(batches.asked) == steps:
            batches.asked.append(time.perf_counter())
        self._steps += steps
        return [after - before for before, after in zip(batches.asked, batches.asked[1:], strict=False)]

    def score(self) -> dict[str, float]:
        """Share of held-out variance left, features a token, steps so far, memory that training took."""
        peak = memory("VmHWM")
        features, reconstruction = self._encode()
        return {
            "fvu": unexplained(self._pool.held_out, reconstruction),
            "l0": float((features != 0).sum(1).double().mean()),
            "steps": self._steps,
            "peak_mib": (peak - self._held) / MIB,
        }

    def save(self, path: str) -> dict[str, float]:
        """Writes decoder and held-out features for those who know the truth; also returns the score."""
        found = self.score()
        features, _ = self._encode()
        save_file({"decoder": self._trainer.decoder().detach().float().contiguous(), "features": features}, path)
        return found

    def _encode(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features, reconstruction = self._trainer.encode(self._pool.held_out)
        return features.float().contiguous(), reconstruction.float()


def run(make: Maker) -> None:
    """Serves until the parent hangs up."""
    side = Side(make)
    asyncio.run(serve({"start": side.start, "train": side.train, "score": side.score, "save": side.save}))


def memory(what: str) -> int:
    """Bytes of this process, ``VmRSS`` now or ``VmHWM`` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(what)


def give_back() -> None:
    """What was freed goes back to the system, so that it does not count as held: glibc alone can say so."""
    ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """``VmHWM`` starts again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def middle(seconds: Sequence[float]) -> float:
    """The median."""
    return statistics.median(seconds)
