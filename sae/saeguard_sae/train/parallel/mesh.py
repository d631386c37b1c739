"""Who of several processes has which tokens and which features, and all that they tell each other while they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PeerLost(Exception):
    """Another process of the run no longer answers."""


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """``data`` times ``shards`` processes: number ``r`` has, of each batch, the rows ``r // shards`` modulo ``data``,
    and of every SAE the part ``r % shards`` of its features.

    Rows are dealt out one by one: the first n of a batch, which some losses look at alone, are spread over all.
    Every process calls the same methods in the same order. Sums are the same number in every process that shares one.
    Without groups it is one process, and nothing is sent.
    """

    data: int = 1
    """Parts of a batch."""
    shards: int = 1
    """Parts of an SAE."""
    rank: int = 0
    """Of this process, from 0."""
    neighbours: int = 1
    """Processes on this machine, this one included."""
    by_rows: Any = None
    """The group of those that have the same features, and other rows."""
    by_features: Any = None
    """The group of those that have the same rows, and other features."""

    @property
    def size(self) -> int:
        """Processes."""
        return self.data * self.shards

    @property
    def is_writer(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    @property
    def shard(self) -> int:
        """Which part of the features is here."""
        return self.rank % self.shards

    @property
    def _row(self) -> int:
        return self.rank // self.shards

    def rows(self, batch: Tensor) -> Tensor:
        """batch [B, ...] -> [B / data, ...] those that are here."""
        return batch if self.data == 1 else batch[self._row :: self.data].contiguous()

    def count(self, first: int) -> int:
        """How many of a batch's first rows are here."""
        return len(range(self._row, first, self.data))

    def features(self, d_sae: int) -> slice:
        """Which of an SAE's features are here."""
        width = d_sae // self.shards
        return slice(self.shard * width, (self.shard + 1) * width)

    def sum_rows(self, part: Tensor) -> Tensor:
        """The sum over the rows of a batch, in place."""
        return self._reduce(part, self.by_rows, dist.ReduceOp.SUM)

    def any_row(self, flags: Tensor) -> Tensor:
        """uint8, in place: whether it is 1 for any row of a batch."""
        return self._reduce(flags, self.by_rows, dist.ReduceOp.MAX)

    def sum_features(self, part: Tensor) -> Tensor:
        """The sum over an SAE's features, in place."""
        return self._reduce(part, self.by_features, dist.ReduceOp.SUM)

    def sum(self, part: Tensor) -> Tensor:
        """Over both, in place."""
        return self.sum_rows(self.sum_features(part))

    def least(self, part: Tensor) -> Tensor:
        """The smallest of all processes', in place."""
        low = self._reduce(part, self.by_features, dist.ReduceOp.MIN)
        return self._reduce(low, self.by_rows, dist.ReduceOp.MIN)

    def gather(self, values: Tensor) -> Tensor:
        """values [n], n different in each process -> all of theirs."""
        if self.size == 1:
            return values
        count = torch.tensor([len(values)], device=values.device)
        counts = [torch.empty_like(count) for _ in range(self.size)]
        _send(dist.all_gather, counts, count)
        lengths = torch.cat(counts).tolist()
        padded = torch.nn.functional.pad(values, (0, max(lengths) - len(values)))
        parts = [torch.empty_like(padded) for _ in lengths]
        _send(dist.all_gather, parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def all_features(self, part: Tensor, dim: int) -> Tensor:
        """What each part of the features has, along ``dim`` in their order, in every process."""
        if self.shards == 1:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.shards)]
        _send(dist.all_gather, parts, part.contiguous(), group=self.by_features)
        return torch.cat(parts, dim)

    def whole(self, part: Tensor) -> Tensor:
        """part [features here, ...] -> [d_sae, ...] on the CPU of the process that writes; elsewhere as it is."""
        if self.shards == 1 or self._row != 0:
            return part
        mine = part.detach().cpu().contiguous()
        if not self.is_writer:
            _send(dist.gather, mine, None, dst=0, group=self.by_features)
            return part
        every = torch.empty(self.shards * len(part), *part.shape[1:], dtype=part.dtype)
        _send(dist.gather, mine, list(every.chunk(self.shards)), dst=0, group=self.by_features)
        return every

    def agreed(self, number: int) -> int:
        """The largest that any process names."""
        if self.size == 1:
            return number
        return int(self._reduce(torch.tensor(number), dist.group.WORLD, dist.ReduceOp.MAX))

    def told(self, word: Any) -> list[Any]:
        """What each process says, by number: plain values."""
        if self.size == 1:
            return [word]
        words: list[Any] = [None] * self.size
        _send(dist.all_gather_object, words, word)
        return words

    def from_one(self, tensor: Tensor, rank: int) -> Tensor:
        """That of process ``rank``, in place; the others' have its shape."""
        if self.size > 1 and tensor.numel():
            _send(dist.broadcast, tensor, src=rank)
        return tensor

    def as_first(self, tensor: Tensor) -> Tensor:
        """That of the process which has the same features and a batch's first row, in place."""
        if self.by_rows is not None:
            _send(dist.broadcast, tensor, src=self.shard, group=self.by_rows)
        return tensor

    def _reduce(self, part: Tensor, group: Any, kind: Any) -> Tensor:
        if group is not None:
            _send(dist.all_reduce, part, op=kind, group=group)
        return part


ALONE = Mesh()


def _send(collective: Callable[..., Any], *given: Any, **named: Any) -> None:
    try:
        collective(*given, **named)
    except RuntimeError as err:
        # gloo has no class of its own for what it raises; a wrong shape is our bug and stays what it is.
        if not isinstance(err, dist.DistError) and "gloo" not in str(err):
            raise
        first = str(err).partition("\n")[0]
        raise PeerLost(f"another process of this run no longer answers ({first})") from err
