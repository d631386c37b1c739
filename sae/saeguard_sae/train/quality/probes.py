"""k-sparse probing: how well a few features tell labelled texts apart (Gurnee et al. 2023; SAEBench's method).

Each text is the mean of its ordinary tokens' features. Features are chosen by the difference of the class means on the
training texts, in their standard deviations, weighted by logistic regression, and scored on texts that had no part in
either. By the plain difference, which is common too, features with large values win over those that tell more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from saeguard_sae.discover.contrast import auroc
from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.quality.logistic import fit

LEAST = 10
"""Texts that each label needs."""
_HELD_OUT = 4
"""One text in so many is held out."""


class Labelled(msgspec.Struct, frozen=True):
    """A line of the probe file; other entries are not read."""

    text: str
    label: str | int | bool


class Score(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Held-out scores, means over the labels."""

    k: int
    """Features that the probe may use; for the dense probe, the width of the activations."""
    auroc: float
    accuracy: float


class Probes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``dense`` is the same probe on all dimensions of the activations: about what there is to be had."""

    labels: tuple[str, ...]
    train_texts: int
    test_texts: int
    sae: tuple[Score, ...]
    frozen: tuple[Score, ...]
    dense: Score
    majority: float
    """Accuracy of always giving the commoner answer, mean over the labels."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which texts belong to which label, and which are held out."""

    names: tuple[str, ...]
    """Of the questions asked: one for two labels, else one per label against the rest."""
    is_label: Tensor
    """bool [questions, texts]"""
    is_test: Tensor
    """bool [texts]"""


def read_labelled(file: Path) -> list[Labelled]:
    """
    Raises:
        TrainError: a line without ``text`` or ``label``, or too few texts of a label; names the file and line.
    """
    found = []
    try:
        lines = file.read_bytes().splitlines()
    except OSError as err:
        raise TrainError(f"probe: {file}: {err.strerror}") from err
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(msgspec.json.decode(line, type=Labelled))
        except (msgspec.DecodeError, msgspec.ValidationError) as err:
            raise TrainError(f'probe: {file}:{number}: {err}; a line is {{"text": "...", "label": "..."}}') from err
    counts: dict[str, int] = {}
    for one in found:
        counts[str(one.label)] = counts.get(str(one.label), 0) + 1
    few = [f"{name!r} has {count}" for name, count in sorted(counts.items()) if count < LEAST]
    if len(counts) < 2 or few:
        what = ", ".join(few) if few else f"it has {len(counts)} labels"
        raise TrainError(f"probe: {file}: needs two labels or more with {LEAST} texts or more each; {what}")
    return found


def split(labels: Sequence[str], seed: int) -> Split:
    """A quarter of each label's texts, by chance, is held out."""
    names = sorted(set(labels))
    is_label = torch.tensor([[one == name for one in labels] for name in names])
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for members in is_label:
        own = members.nonzero().flatten()
        picked = torch.randperm(len(own), generator=generator)[: max(1, len(own) // _HELD_OUT)]
        is_test[own[picked]] = True
    asked = names[1:] if len(names) == 2 else names
    return Split(tuple(asked), is_label[-len(asked) :], is_test)


Pooled = Callable[[], Iterable[tuple[slice, Tensor]]]
"""Reads all texts again: the texts of a part, and their mean features [texts, d_sae]."""


def score_sparse(pooled: Pooled, asked: Split, numbers: tuple[int, ...]) -> tuple[Score, ...]:
    """The scores for each k. Two passes, so that the features of all texts are never held: choose, then fetch."""
    chosen = _chosen(pooled, asked, max(numbers))
    kept = torch.cat([part[:, chosen.flatten()].cpu() for _, part in pooled()])
    values = kept.view(len(kept), *chosen.shape)
    return tuple(
        _score(k, [values[:, at, :k] for at in range(len(chosen))], asked) for k in numbers if k <= chosen.shape[1]
    )


def score_dense(x: Tensor, asked: Split) -> Score:
    """x [texts, width] -> the scores of probes that may use all of it."""
    return _score(x.shape[1], [x.cpu()] * len(asked.names), asked)


def majority(asked: Split) -> float:
    """Held-out accuracy of always giving the answer that is commoner among the training texts."""
    commoner = asked.is_label[:, ~asked.is_test].double().mean(1) > 0.5
    return float((asked.is_label[:, asked.is_test] == commoner[:, None]).double().mean())


def _chosen(pooled: Pooled, asked: Split, most: int) -> Tensor:
    """[questions, k] features by |mean inside - mean outside| / deviation on the training texts, the largest first."""
    groups = torch.cat([asked.is_label, ~asked.is_label]).double() * ~asked.is_test
    train = (~asked.is_test).double()[None]
    sums: list[Tensor] = []
    for texts, part in pooled():
        values = part.double().cpu()
        here = [groups[:, texts] @ values, train[:, texts] @ values, train[:, texts] @ values.square()]
        sums = here if not sums else [one + more for one, more in zip(sums, here, strict=True)]
    inside, outside = (sums[0] / groups.sum(1, keepdim=True)).chunk(2)
    mean, square = sums[1] / train.sum(), sums[2] / train.sum()
    variance = square - mean.square()
    # What rounding leaves of a feature that never changes is no deviation.
    is_varied = variance > 1e-10 * square
    score = torch.where(is_varied, (inside - outside).abs() / variance.clamp(min=1e-300).sqrt(), 0.0)
    return score.topk(min(most, score.shape[1]), dim=1).indices


def _score(k: int, values: list[Tensor], asked: Split) -> Score:
    """values: for each question [texts, k]."""
    ranks, hits = [], []
    for x, wanted in zip(values, asked.is_label, strict=True):
        train, test = x[~asked.is_test].double(), x[asked.is_test].double()
        mean, deviation = train.mean(0), train.std(0)
        deviation = torch.where(deviation > 0, deviation, 1.0)
        probe = fit((train - mean) / deviation, wanted[~asked.is_test])
        scores = (test - mean) / deviation @ probe.weight + probe.bias
        truth = wanted[asked.is_test]
        ranks.append(float(auroc(scores[truth, None], scores[~truth, None])))
        hits.append(float(((scores > 0) == truth).double().mean()))
    return Score(k=k, auroc=sum(ranks) / len(ranks), accuracy=sum(hits) / len(hits))
