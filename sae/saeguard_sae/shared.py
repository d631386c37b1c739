"""Products of tokens with the rows of their features: rows that many requests share are held, and read, once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WORTH_SHARING = 2
"""Different rows, at most so many times those of one request: with more, whole products do more than they save."""


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Rows of E features for each of B requests; ``index`` is None where each request has rows of its own."""

    W_enc: Tensor
    """[B, E, d_read], or the U different rows [U, d_read]."""
    W_dec: Tensor
    """[B, E, d_write], or [U, d_write]."""
    index: Tensor | None = None
    """int64 [B, 1, E], which of the U rows."""

    @classmethod
    def of(cls, W_enc: Tensor, W_dec: Tensor, at: slice | Tensor, row: Tensor) -> Product:
        """The rows as they lie in a table.

        Args:
            W_enc: [slots, capacity, d_read], and so W_dec.
            at: the B slots.
            row: int64 [B, E] of their first E columns, equal where rows are.
        """
        used = row.shape[1]
        found, index = torch.unique(row, return_inverse=True)
        if len(found) > _WORTH_SHARING * used or len(row) == 1:
            return cls(W_enc[at, :used], W_dec[at, :used])
        first = torch.empty_like(found).scatter_(0, index.flatten(), torch.arange(row.numel(), device=row.device))
        slots = torch.arange(len(W_enc), device=row.device)[at][first // used]
        return cls(W_enc[slots, first % used], W_dec[slots, first % used], index[:, None])

    def read(self, x: Tensor) -> Tensor:
        """x [B, T, d_read] -> its products [B, T, E] with the rows of W_enc."""
        if self.index is None:
            return torch.bmm(x, self.W_enc.transpose(1, 2))
        return (x @ self.W_enc.T).gather(-1, self.index.expand(-1, x.shape[1], -1))

    def write(self, size: Tensor) -> Tensor:
        """size [B, T, E] -> the sum [B, T, d_write] of so much of each row of W_dec."""
        if self.index is None:
            return torch.bmm(size, self.W_dec)
        spread = size.new_zeros(*size.shape[:2], len(self.W_dec))
        return spread.scatter_add_(-1, self.index.expand_as(size), size) @ self.W_dec
