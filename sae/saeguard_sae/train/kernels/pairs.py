"""Which features fire on which tokens, as flat lists."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Token r has the features ``feature[starts[r]:starts[r + 1]]``, ascending."""

    starts: Tensor
    """int64 [B + 1]"""
    feature: Tensor
    """int32 [n]"""

    @classmethod
    def join(cls, parts: list[Pairs]) -> Pairs:
        """Those of consecutive tokens, one after the other."""
        if len(parts) == 1:
            return parts[0]
        counts = torch.cat([one.starts.diff() for one in parts])
        return cls(starts(counts), torch.cat([one.feature for one in parts]))

    def rows(self) -> Tensor:
        """int64 [n] the token of each pair."""
        tokens = torch.arange(len(self.starts) - 1, device=self.starts.device)
        return tokens.repeat_interleave(self.starts.diff(), output_size=len(self.feature))

    def keep(self, mask: Tensor) -> Pairs:
        """Those where ``mask`` [n] is True."""
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        return Pairs(before[self.starts], self.feature[mask])


class Decoded(NamedTuple):
    """What pairs make of B tokens at L levels, whose features end at rising widths."""

    pulls: Tensor
    """[L, B, d] the gradient by the reconstruction of a feature whose first level this is."""
    last: Tensor
    """[B, d] the last level's error, reconstruction minus target."""
    squares: Tensor
    """[B, L] squared length of each level's error."""
    slopes: Tensor
    """[n] the gradient by each pair's value; 0 where it does not fire."""


def starts(counts: Tensor) -> Tensor:
    """int64 [B] pairs per token -> [B + 1]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
