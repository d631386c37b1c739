"""Counts by bins."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

_BINS = 64
"""Of a histogram of whole numbers; fewer where there are fewer numbers."""


class Histogram(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``counts[i]`` lie in ``edges[i] <= value < edges[i + 1]``; the last bin holds its upper edge too."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def of_values(values: Tensor, edges: Tensor) -> Histogram:
    """values [n] between the edges [bins + 1], which rise; those beyond count in the outermost bins."""
    at = (torch.bucketize(values.double().cpu(), edges.double(), right=True) - 1).clamp(0, len(edges) - 2)
    counts = torch.bincount(at, minlength=len(edges) - 1)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def of_whole_numbers(counts: Tensor) -> Histogram:
    """counts [n] of how often each number 0, 1, ... came up -> bins of equal width from the least to the largest."""
    present = counts.nonzero().flatten()
    if not len(present):
        return Histogram((0.0, 1.0), (0,))
    low, high = int(present[0]), int(present[-1]) + 1
    width = -(-(high - low) // _BINS)
    bins = -(-(high - low) // width)
    at = (torch.arange(low, high) - low) // width
    binned = torch.zeros(bins, dtype=torch.long).index_add_(0, at, counts[low:high])
    edges = tuple(float(low + width * one) for one in range(bins + 1))
    return Histogram(edges, tuple(binned.tolist()))
