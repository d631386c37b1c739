"""Rows of tokens that the model reads together, and which of them count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One row of tokens: ids [T] int64 and bool [T], which of them are ordinary: read and replaced by the SAE."""

    ids: Tensor
    ordinary: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded at the end to one length: all [rows, T]."""

    ids: Tensor
    ordinary: Tensor
    """Which tokens the SAE reads and replaces: not BOS, other special tokens, padding."""
    real: Tensor
    """Which are not padding."""

    @property
    def predicted(self) -> Tensor:
        """bool [rows, T - 1]: positions whose next token is text, so that its loss counts."""
        return self.real[:, :-1] & self.real[:, 1:]

    def to(self, device: torch.device) -> Batch:
        """The same batch elsewhere."""
        return Batch(self.ids.to(device), self.ordinary.to(device), self.real.to(device))


def padded(rows: Sequence[Row]) -> Batch:
    """Rows of any lengths as one batch. A causal model sees nothing of what follows: padding may be any token."""
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    ordinary = torch.zeros(len(rows), length, dtype=torch.bool)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = row.ids
        ordinary[at, : len(row.ids)] = row.ordinary
        real[at, : len(row.ids)] = True
    return Batch(ids, ordinary, real)


def batches(rows: Iterable[Row], tokens: int) -> Iterator[Batch]:
    """Batches of at most ``tokens`` tokens with their padding, in the order of the rows; of one row at least."""
    held: list[Row] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.ids))
        if held and longest * (len(held) + 1) > tokens:
            yield padded(held)
            held, longest = [], len(row.ids)
        held.append(row)
    if held:
        yield padded(held)
