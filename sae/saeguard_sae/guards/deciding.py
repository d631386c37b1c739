"""From the values of sums on consecutive tokens, and what was kept of earlier ones, to on or off on each of them.

Cells are [B, T, G]: requests, tokens, guards. Nothing here depends on how a text is cut into parts: what a part leaves
behind is exactly what the next one needs. Most passes read one token of each request, and need no scan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Scan(NamedTuple):
    """bool [B, T, G] each."""

    on: Tensor
    """After each token."""
    fired: Tensor
    """Whether it came on at or before each token."""


def over_tokens(cells: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, T, G] -> [B, G] by what takes the largest, smallest or sum along dimension 1."""
    return cells[:, 0] if cells.shape[1] == 1 else how(cells)


def running_maximum(value: Tensor, inside: Tensor, before: Tensor) -> Tensor:
    """[B, T, G] the largest value in scope so far; ``before`` [B, G] of earlier tokens."""
    masked = torch.where(inside, value, -torch.inf)
    so_far = masked if value.shape[1] == 1 else masked.cummax(dim=1).values
    return torch.maximum(so_far, before[:, None])


def window_sums(value: Tensor, inside: Tensor, ring: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the last values in scope at each token, and the ring that goes on from there.

    Each window is added up on its own, so that no error runs along.

    Args:
        value: float64 [B, T, G].
        inside: bool [B, T, G], tokens out of scope are skipped.
        ring: [B, G, R] the last values of earlier tokens, the latest last, zeros while there are fewer.
        tokens: int64 [B, G], how many values a window holds, at most R + 1.
    """
    length, back = value.shape[1], ring.shape[2]
    recent = torch.arange(back, -1, -1, device=value.device) < tokens[..., None]
    if length == 1:
        line = torch.cat([ring, value.transpose(1, 2)], dim=-1)
        return (line * recent).sum(dim=-1)[:, None], torch.where(inside.transpose(1, 2), line[..., 1:], ring)
    rank = inside.cumsum(dim=1).transpose(1, 2)
    # Values in scope lie one after the other behind the ring; the others are written where nobody looks.
    place = torch.where(inside.transpose(1, 2), back - 1 + rank, back + length)
    line = functional.pad(ring, (0, length + 1)).scatter_(2, place, value.transpose(1, 2))
    windows = line[..., :-1].unfold(2, back + 1, 1)
    sums = (windows * recent[:, :, None]).sum(dim=-1)
    kept = rank[..., -1:] + torch.arange(back, device=value.device)
    return sums.gather(2, (rank - 1).clamp_min(0)).transpose(1, 2), line.gather(2, kept)


def hold(comes: Tensor, stays: Tensor, inside: Tensor, on: Tensor, fired: Tensor) -> Scan:
    """Hysteresis: on where it ``comes``, as long as it ``stays``; tokens out of scope leave it as it is.

    Whether it is on is whether the last token on which it came is later than the last on which it did not stay.

    Args:
        on: bool [B, G] before the first token.
        fired: bool [B, G] whether it was ever on before.
    """
    if comes.shape[1] == 1:
        came = inside & comes
        return Scan(came | (on[:, None] & ~(inside & ~stays)), fired[:, None] | came)
    at = torch.arange(2, comes.shape[1] + 2, device=comes.device)[:, None]
    came = torch.where(inside & comes, at, on[:, None].long()).cummax(dim=1).values
    left = torch.where(inside & ~stays, at, (~on)[:, None].long()).cummax(dim=1).values
    return Scan(came > left, fired[:, None] | (came > 1))
