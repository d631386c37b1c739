"""Whose tokens a forward pass reads: requests' tokens lie flat, one after the other, and are edited in groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class RowSpan(NamedTuple):
    """One request's tokens ``[start, start + length)`` among those of the pass; ``slot`` is its row of the tables."""

    slot: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """B requests' tokens as cells [B, T]: those that read about equally many, padded to the longest of them.

    A padded cell repeats its request's last token at position -1, which is in no edit's scope.
    """

    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: Tensor | slice  # of each cell, its token: int64 [B, T]; a slice where T is 1 and they lie together
    positions: Tensor  # int64 [B, T], the token's position in its request
    special: Tensor  # bool [B, T], True for special tokens
    filled: Tensor | None  # int64 [n], the numbers in B x T of the cells that are not padded; None where none is
    generated: Tensor | None = None  # bool [B, T], True where a token counts as generated; None where all of them do

    @classmethod
    def singles(cls, slots: tuple[int, ...], positions: Tensor, special: Tensor) -> Group:
        """The first tokens of a pass, one of each slot; positions and special flags are the whole pass'."""
        count = len(slots)
        return cls(slots, (1,) * count, slice(0, count), positions[:count, None], special[:count, None], None)

    def take(self, x: Tensor) -> Tensor:
        """x [N, ...] -> the cells' [B, T, ...]."""
        return _cells(x, self.tokens)

    def put(self, cells: Tensor, x: Tensor) -> None:
        if isinstance(self.tokens, slice):
            x[self.tokens] = cells[:, 0]
        elif self.filled is None:
            x[self.tokens.flatten()] = cells.flatten(0, 1)
        else:
            x[self.tokens.flatten()[self.filled]] = cells.flatten(0, 1)[self.filled]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    groups: tuple[Group, ...] = ()

    @classmethod
    def of(cls, spans: Sequence[RowSpan], positions: Tensor, special: Tensor, generated: Tensor | None = None) -> Rows:
        """Groups spans, one a request, by the power of two that holds them: less than half of the cells are padded.

        Args:
            positions: int64 [N] of the pass' tokens; bool [N] whether each is ``special``, and counts as ``generated``
                (None where no column asks).
        """
        by_size: dict[int, list[RowSpan]] = defaultdict(list)
        for span in spans:
            by_size[(span.length - 1).bit_length()].append(span)
        return cls(tuple(_group(group, positions, special, generated) for group in by_size.values()))


def as_index(slots: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """These slots as an index of a table; neighbouring ones are a view of it."""
    if slots == tuple(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, device=device)


def _group(spans: list[RowSpan], positions: Tensor, special: Tensor, generated: Tensor | None) -> Group:
    slots, starts, lengths = zip(*spans, strict=True)
    if max(lengths) == 1:
        first = starts[0]
        lie_together = list(starts) == list(range(first, first + len(starts)))
        tokens = (
            slice(first, first + len(starts))
            if lie_together
            else torch.tensor(starts, device=positions.device)[:, None]
        )
        own = None if generated is None else _cells(generated, tokens)
        return Group(slots, lengths, tokens, _cells(positions, tokens), _cells(special, tokens), None, own)
    longest = max(lengths)
    at = torch.arange(longest)
    sizes = torch.tensor(lengths)[:, None]
    index = torch.tensor(starts)[:, None] + torch.minimum(at, sizes - 1)
    padded = at >= sizes
    filled = None if min(lengths) == longest else (~padded).flatten().nonzero().squeeze(1).to(positions.device)
    index, padded = index.to(positions.device), padded.to(positions.device)
    own = None if generated is None else generated[index]
    return Group(slots, lengths, index, positions[index].masked_fill(padded, -1), special[index], filled, own)


def _cells(flat: Tensor, tokens: Tensor | slice) -> Tensor:
    return flat[tokens][:, None] if isinstance(tokens, slice) else flat[tokens]
