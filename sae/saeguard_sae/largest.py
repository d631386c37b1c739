"""The n largest of each row, several times faster on a CPU than ``topk`` over a wide row.

The columns are dealt into piles. The n piles with the largest tops hold the n largest, and only they are looked into.
"""

from __future__ import annotations

from torch import Tensor


def largest(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """values [N, size] -> values and columns as ``topk(n)`` gives them, but for which of equal ones it takes."""
    size = values.shape[1]
    height = _height(size, n)
    if height == 1:
        found = values.topk(n, dim=-1)
        return found.values, found.indices
    # Cards lie so that every pile's column is read in one sweep: card j of pile i is column j * piles + i.
    cards = values.view(len(values), height, size // height)
    piles = largest(cards.amax(dim=1), n)[1]
    held = cards.gather(2, piles[:, None].expand(-1, height, -1)).flatten(1)
    found = held.topk(n, dim=-1)
    pile = piles.gather(1, found.indices % n)
    return found.values, found.indices.div(n, rounding_mode="floor") * (size // height) + pile


def _height(size: int, n: int) -> int:
    """The power of two that divides size and leaves about as much to look at among the tops as in the piles."""
    height = 1
    while n and size % (2 * height) == 0 and n * (2 * height) ** 2 <= size:
        height *= 2
    return height
