"""k-sparse probing: how well a few features tell labelled texts apart (Gurnee et al. 2023; SAEBench's method).

Each text is the mean of its ordinary tokens' features. Features are chosen by the difference of the class means on the
training texts, in their standard deviations, weighted by logistic regression, and scored on texts that had no part in
either. By the plain difference, which is common too, features with large values win over those that tell more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from saeguard_sae.check.measure import VALUES, Reader, target
from saeguard_sae.coders import MatchingPursuit
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.discover import auroc
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import ModelConfig, Site, depth, hooked
from saeguard_sae.train.quality.metrics import EvaluateSettings, EvaluationBatch, EvaluationRow, padded
from saeguard_sae.train.settings import TrainError

# Logistic regression with an L2 penalty, by Newton's method: small, exact, the same on every machine.


_ROUNDS = 100
_STEADY = 1e-9
"""A step this small in every weight ends the search."""


class Linear(NamedTuple):
    """A score ``x @ weight + bias``; above 0 means yes."""

    weight: Tensor
    bias: Tensor


def fit(x: Tensor, y: Tensor, penalty: float = 1.0) -> Linear:
    """x [n, d], y [n] bool -> the minimum of ``penalty / 2 * |weight|^2 + sum of losses``; in float64.

    The bias is not penalised. That is scikit-learn's ``LogisticRegression`` with ``C = 1 / penalty``.
    """
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], dim=1)
    y = y.double()
    ridge = torch.full((x.shape[1],), penalty, dtype=torch.float64, device=x.device)
    ridge[-1] = 1e-9  # keeps the bias finite where one side is empty
    w = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for _ in range(_ROUNDS):
        step = _newton(x, y, w, ridge)
        w = w - _shortened(x, y, w, ridge, step) * step
        if float(step.abs().max()) < _STEADY:
            break
    return Linear(w[:-1], w[-1])


def _newton(x: Tensor, y: Tensor, w: Tensor, ridge: Tensor) -> Tensor:
    chance = torch.sigmoid(x @ w)
    slope = x.T @ (chance - y) + ridge * w
    curvature = (x * (chance * (1 - chance))[:, None]).T @ x + torch.diag(ridge)
    solved: Tensor = torch.linalg.solve(curvature, slope)
    return solved


def _shortened(x: Tensor, y: Tensor, w: Tensor, ridge: Tensor, step: Tensor) -> float:
    """The share of the step, halved until it leads down: a full one overshoots where the classes are far apart."""
    share, start = 1.0, _cost(x, y, w, ridge)
    while share > 1e-6 and _cost(x, y, w - share * step, ridge) > start + 1e-12:
        share /= 2
    return share


def _cost(x: Tensor, y: Tensor, w: Tensor, ridge: Tensor) -> float:
    score = x @ w
    return float((torch.nn.functional.softplus(score) - y * score).sum() + 0.5 * (ridge * w * w).sum())


LEAST = 10
"""Texts that each label needs."""
_HELD_OUT = 4
"""One text in so many is held out."""


class LabelledTexts(msgspec.Struct, frozen=True):
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


def read_labelled(file: Path) -> list[LabelledTexts]:
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
            found.append(msgspec.json.decode(line, type=LabelledTexts))
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


# The model at the place of an SAE: what is there, and what the model says when something else is put there.


@dataclass(frozen=True, slots=True)
class CapturedSite:
    """What is at the sites for the ordinary tokens of a batch, in their order."""

    read: Tensor
    """[n, d_in] what the SAE reads, float32."""
    wanted: Tensor
    """[n, d_out] what it must reproduce, float32."""
    logits: Tensor | None
    """[rows, T, vocabulary]; None where the pass ended at the sites."""


class _Reached(Exception):
    """Ends a forward pass behind the last site."""


class Subject:
    """A model with the place where one SAE reads, what it must reproduce, and where that is written."""

    def __init__(self, model: nn.Module, config: ModelConfig, sae: LoadedSae) -> None:
        """
        Raises:
            TrainError: an SAE that is no function of one token, or writes its part at several sites.
        """
        wanted = target(sae)
        if wanted is None:
            raise TrainError(
                f"SAE {sae.name!r} writes at {len(sae.write_sites)} sites; one that writes at one is needed"
            )
        if not isinstance(sae.dictionary, Dictionary | MatchingPursuit):
            kind = sae.dictionary.architecture
            raise TrainError(f"SAE {sae.name!r} is {kind}, which reads whole texts; `saeguard sae check` measures it")
        self.model, self.config = model, config
        self.reads, self.target, self.writes = sae.site, wanted, sae.write_sites[0]
        self._gain = sae.write_gain
        self._name, self._widths = sae.name, (sae.dictionary.d_in, sae.dictionary.d_out)
        self.device = next(model.parameters()).device

    def capture(self, batch: EvaluationBatch, *, logits: bool = True) -> CapturedSite:
        """Reads a batch as the model is.

        Args:
            logits: False ends the pass at the sites.

        Raises:
            TrainError: activations that are not finite, or not of the SAE's width.
        """
        seen: dict[Site, Tensor] = {}
        last = max((self.reads, self.target), key=depth)

        def visit(site: Site, x: Tensor, see: Tensor) -> None:
            seen[site] = see[batch.ordinary].float()
            if site == last and not logits:
                raise _Reached

        found: Tensor | None = None
        with hooked(self.model, self.config, (self.reads, self.target), visit), suppress(_Reached):
            found = self._forward(batch)
        self._check(seen)
        return CapturedSite(seen[self.reads], seen[self.target], found)

    def spliced(self, batch: EvaluationBatch, captured: CapturedSite, new: Tensor) -> Tensor:
        """The logits [rows, T, vocabulary] with ``new`` [n, d_out] in place of what ``captured.wanted`` was."""

        def visit(site: Site, x: Tensor, see: Tensor) -> Tensor:
            if self.writes == self.target:
                rows = new
            else:
                error = (new - captured.wanted) if self._gain is None else (new - captured.wanted) * self._gain.to(new)
                rows = x[batch.ordinary].float() + error
            out = x.clone()
            out[batch.ordinary] = rows.to(x.dtype)
            return out

        with hooked(self.model, self.config, (self.writes,), visit):
            return self._forward(batch)

    def _check(self, seen: dict[Site, Tensor]) -> None:
        for site, width, does in ((self.reads, self._widths[0], "reads"), (self.target, self._widths[1], "writes")):
            if seen[site].shape[1] != width:
                raise TrainError(f"SAE {self._name!r} {does} {width} wide, and {site} is {seen[site].shape[1]} wide")
            if not torch.isfinite(seen[site]).all():
                raise TrainError(f"the model's activations at {site} are not finite")

    def _forward(self, batch: EvaluationBatch) -> Tensor:
        output: Any = self.model(input_ids=batch.ids, use_cache=False)
        logits: Tensor = output.logits
        return logits


# Runs the probes on a model: pooled features of labelled texts, read as often as they are needed, never all held.


_TEXTS = 16
"""Read at once."""


class Probing:
    """Labelled texts, tokenised, on one model."""

    def __init__(self, subject: Subject, texts: Sequence[tuple[EvaluationRow, str]]) -> None:
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

    def _activations(self) -> Iterator[tuple[EvaluationBatch, Tensor]]:
        for start in range(0, len(self._texts), _TEXTS):
            batch = padded([row for row, _ in self._texts[start : start + _TEXTS]]).to(self._subject.device)
            yield batch, self._subject.capture(batch, logits=False).read

    def _pooled(self, reader: Reader) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for batch, x in self._activations():
            yield slice(start, start + len(batch.ids)), _mean_features(reader, x, batch)
            start += len(batch.ids)


def _mean(values: Tensor, batch: EvaluationBatch) -> Tensor:
    """values [n, width] of the batch's ordinary tokens -> [rows, width] means; zeros for a row without any."""
    row = batch.ordinary.nonzero()[:, 0]
    total = values.new_zeros(len(batch.ids), values.shape[1]).index_add_(0, row, values)
    return total / batch.ordinary.sum(1).clamp(min=1)[:, None]


def _mean_features(reader: Reader, x: Tensor, batch: EvaluationBatch) -> Tensor:
    row = batch.ordinary.nonzero()[:, 0]
    total = x.new_zeros(len(batch.ids), reader.d_sae)
    size = max(1, VALUES // reader.d_sae)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        total.index_add_(0, row[part], reader.encode(x[part]))
    return total / batch.ordinary.sum(1).clamp(min=1)[:, None]
