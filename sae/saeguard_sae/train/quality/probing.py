"""Runs the probes on a model: pooled features of labelled texts, read as often as they are needed, never all held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saeguard_sae.check.tally import VALUES, Reader
from saeguard_sae.train.quality.batch import Batch, Row, padded
from saeguard_sae.train.quality.probes import Probes, majority, score_dense, score_sparse, split
from saeguard_sae.train.quality.settings import EvaluateSettings
from saeguard_sae.train.quality.subject import Subject

_TEXTS = 16
"""Read at once."""


class Probing:
    """Labelled texts, tokenised, on one model."""

    def __init__(self, subject: Subject, texts: Sequence[tuple[Row, str]]) -> None:
        self._subject = subject
        self._texts = texts

    def run(self, sae: Reader, frozen: Reader, settings: EvaluateSettings) -> Probes:
        """The probes of an SAE, of the frozen baseline, and on the activations themselves."""
        labels = [label for _, label in self._texts]
        asked = split(labels, settings.seed)
        dense = torch.cat([_mean(x, batch) for batch, x in self._activations()])
        return Probes(
            labels=tuple(sorted(set(labels))),
            train_texts=int((~asked.is_test).sum()),
            test_texts=int(asked.is_test.sum()),
            sae=score_sparse(lambda: self._pooled(sae), asked, settings.probe_k),
            frozen=score_sparse(lambda: self._pooled(frozen), asked, settings.probe_k),
            dense=score_dense(dense, asked),
            majority=majority(asked),
        )

    def _activations(self) -> Iterator[tuple[Batch, Tensor]]:
        for start in range(0, len(self._texts), _TEXTS):
            batch = padded([row for row, _ in self._texts[start : start + _TEXTS]]).to(self._subject.device)
            yield batch, self._subject.capture(batch, logits=False).read

    def _pooled(self, reader: Reader) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for batch, x in self._activations():
            yield slice(start, start + len(batch.ids)), _mean_features(reader, x, batch)
            start += len(batch.ids)


def _mean(values: Tensor, batch: Batch) -> Tensor:
    """values [n, width] of the batch's ordinary tokens -> [rows, width] means; zeros for a row without any."""
    row = batch.ordinary.nonzero()[:, 0]
    total = values.new_zeros(len(batch.ids), values.shape[1]).index_add_(0, row, values)
    return total / batch.ordinary.sum(1).clamp(min=1)[:, None]


def _mean_features(reader: Reader, x: Tensor, batch: Batch) -> Tensor:
    row = batch.ordinary.nonzero()[:, 0]
    total = x.new_zeros(len(batch.ids), reader.d_sae)
    size = max(1, VALUES // reader.d_sae)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        total.index_add_(0, row[part], reader.encode(x[part]))
    return total / batch.ordinary.sum(1).clamp(min=1)[:, None]
