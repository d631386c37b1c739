"""What the model predicts, held against the text and against what it predicts as it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from saeguard_sae.train.quality.batch import Batch

_POSITIONS = 128
"""Whose log-probabilities are held at once: vocabularies go up to hundreds of thousands."""


class Loss:
    """Means over the positions whose next token is text, in nats."""

    def __init__(self) -> None:
        self._nats = 0.0
        self._divergence = 0.0
        self.positions = 0

    @property
    def cross_entropy(self) -> float:
        """Of the next token."""
        return self._nats / self.positions

    @property
    def divergence(self) -> float:
        """KL(changed || base): how surprising what the changed model would say is to the model as it is."""
        return self._divergence / self.positions

    def add(self, logits: Tensor, batch: Batch, base: Tensor | None = None) -> None:
        """logits [rows, T, vocabulary] of a batch, and those of the model as it is."""
        predicted = batch.predicted
        following = batch.ids[:, 1:][predicted]
        row, at = predicted.nonzero(as_tuple=True)
        self.positions += len(following)
        for part in torch.split(torch.arange(len(following), device=logits.device), _POSITIONS):
            scores = logits[row[part], at[part]].float().log_softmax(-1)
            self._nats += float(functional.nll_loss(scores, following[part], reduction="sum"))
            if base is not None:
                before = base[row[part], at[part]].float().log_softmax(-1)
                self._divergence += float((scores.exp() * (scores - before)).sum(dtype=torch.float64))
