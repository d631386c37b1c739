"""One unit as a detector of one concept: the cut that gives the best F1 on tokens, and that cut on other tokens.

The same procedure serves SAE features, neurons and residual dimensions, so that they can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Detectors:
    """Per unit [units]: fires where ``value > cut``, with the F1 that this had where it was chosen."""

    cut: Tensor
    f1: Tensor


def best_detectors(values: Tensor, labels: Tensor, chunk: int = 128) -> Detectors:
    """values [tokens, units], labels [tokens] bool -> for each unit the exact best cut over all its values."""
    parts = [_best(part, labels) for part in torch.split(values, chunk, dim=1)]
    return Detectors(torch.cat([part.cut for part in parts]), torch.cat([part.f1 for part in parts]))


def f1_of(values: Tensor, labels: Tensor, cut: Tensor) -> Tensor:
    """F1 [units] of ``values > cut`` [tokens, units] against ``labels`` [tokens]: 2 tp / (fired + positives)."""
    fires = values > cut
    hits = fires[labels].sum(0)
    return 2 * hits / (fires.sum(0) + labels.sum()).clamp(min=1)


def _best(values: Tensor, labels: Tensor) -> Detectors:
    ordered, order = values.sort(dim=0, descending=True)
    hits = labels[order].cumsum(0)
    fired = torch.arange(1, len(labels) + 1)[:, None]
    f1 = 2 * hits / (fired + labels.sum())
    below = torch.cat([ordered[1:], torch.full_like(ordered[:1], -torch.inf)])
    # A cut between equal values does not exist.
    best = f1.masked_fill(ordered == below, 0.0).max(0)
    return Detectors(below.gather(0, best.indices[None]).squeeze(0), best.values)
