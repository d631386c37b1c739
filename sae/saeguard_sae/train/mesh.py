"""The processes that train one SAE together, as a learner sees them. ``ALONE`` is one process."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Mesh(Protocol):
    """Every process calls the same methods in the same order."""

    shares: int
    """Processes that have batches of their own."""

    def total(self, part: Tensor) -> Tensor:
        """The sum over those processes, in place."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """values [n], n different in each process -> all of theirs, one after the other."""
        ...


class _Alone:
    shares = 1

    def total(self, part: Tensor) -> Tensor:
        return part

    def gather(self, values: Tensor) -> Tensor:
        return values


ALONE: Mesh = _Alone()
