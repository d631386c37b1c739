"""Contrast between two sets of documents, feature by feature."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(values: Tensor, document: Tensor) -> Tensor:
    """values [tokens, units], document [tokens] 0, 1, ... -> each document's mean [documents, units]."""
    documents = int(document.max()) + 1
    total = torch.zeros(documents, values.shape[1]).index_add_(0, document, values.float())
    return total / torch.bincount(document, minlength=documents).clamp(min=1)[:, None]


def auroc(positive: Tensor, negative: Tensor, chunk: int = 64) -> Tensor:
    """positive [p, units], negative [n, units] -> [units]: P(p > n) + P(p = n) / 2 (Mann and Whitney).

    Saturates at 1 for many features once they are pooled over documents; rank by token F1 then.
    """
    if positive.shape[0] == 0 or negative.shape[0] == 0:
        raise ValueError("auroc needs at least one row of either kind")
    scores = []
    for p, n in zip(torch.split(positive, chunk, dim=1), torch.split(negative, chunk, dim=1), strict=True):
        above = (p[:, None] > n[None]).float().mean((0, 1))
        equal = (p[:, None] == n[None]).float().mean((0, 1))
        scores.append(above + equal / 2)
    return torch.cat(scores)
