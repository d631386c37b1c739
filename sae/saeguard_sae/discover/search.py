"""The search for a concept's features: ranked on one set of tokens, scored again on another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard_sae.discover.contrast import auroc, pool
from saeguard_sae.discover.detectors import best_detectors, f1_of


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Values of units on tokens [tokens, units], whether each token shows the concept, and each token's document."""

    values: Tensor
    labels: Tensor
    document: Tensor

    def __post_init__(self) -> None:
        if not len(self.values) == len(self.labels) == len(self.document):
            raise ValueError("values, labels and document must have one row per token")
        if not self.labels.any() or self.labels.all():
            raise ValueError("labels must hold tokens with and without the concept")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A unit that seems to stand for the concept."""

    unit: int
    cut: float
    """It fires above this value."""
    train_f1: float
    """F1 on tokens, where it was chosen: biased upwards, since it is the best of many."""
    heldout_f1: float
    """The same cut on tokens that had no say."""
    heldout_auroc: float
    """Documents that show the concept against those that do not, by mean value, held out."""


def rank(data: Labelled, top: int = 16) -> list[int]:
    """The ``top`` units by the best F1 that they can have on these tokens, best first."""
    best: list[int] = best_detectors(data.values, data.labels).f1.argsort(descending=True)[:top].tolist()
    return best


def search(train: Labelled, heldout: Labelled, top: int = 16) -> list[Candidate]:
    """The ``top`` units by F1 on ``train``, each re-scored on ``heldout``."""
    found = best_detectors(train.values, train.labels)
    units = found.f1.argsort(descending=True)[:top]
    again = f1_of(heldout.values[:, units], heldout.labels, found.cut[units])
    contrast = _contrast(heldout, units)
    rows = zip(units, found.cut[units], found.f1[units], again, contrast, strict=True)
    return [
        Candidate(int(u), float(cut), float(f1), float(f1_again), float(area)) for u, cut, f1, f1_again, area in rows
    ]


def _contrast(data: Labelled, units: Tensor) -> Tensor:
    """AUROC [units] of the pooled values, a document being positive when it holds any labelled token."""
    pooled = pool(data.values[:, units], data.document)
    positive = pool(data.labels[:, None].float(), data.document).squeeze(1) > 0
    if positive.all() or not positive.any():
        return torch.full((len(units),), torch.nan)
    return auroc(pooled[positive], pooled[~positive])
