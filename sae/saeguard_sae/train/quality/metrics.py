"""Sums over tokens, part by part, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from saeguard_sae.check.measure import VALUES, Reader
from saeguard_sae.check.measure import Tally as Errors
from saeguard_sae.train.settings import TrainError

Watch = Callable[[Tensor, int], None]
"""``watch(features [n, d_sae], start)``: of the tokens from ``start`` on."""


class Tally:
    """What fired on a token, what fired at all, and how near the reconstructions come."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.tokens = 0
        self.by_l0 = torch.zeros(d_sae + 1, dtype=torch.long, device=device)
        """[d_sae + 1] tokens on which so many features fired."""
        self.fired = torch.zeros(d_sae, dtype=torch.long, device=device)
        """[d_sae] tokens on which each feature fired."""
        self._errors = Errors()
        self._cosine = torch.zeros((), dtype=torch.float64, device=device)
        self._ratio = torch.zeros((), dtype=torch.float64, device=device)
        self._directed = torch.zeros((), dtype=torch.long, device=device)

    def count(self, features: Tensor) -> None:
        """features [n, d_sae] of n more tokens; a feature fires where it is not 0."""
        is_on = features != 0
        self.tokens += len(features)
        self.by_l0 += torch.bincount(is_on.sum(1), minlength=len(self.by_l0))
        self.fired += is_on.sum(0)

    def compare(self, made: Tensor, wanted: Tensor) -> None:
        """Reconstructions and what they stand for, both [n, width] in float32."""
        self._errors.compare(made, wanted)
        made_norm, norm = made.norm(dim=1).double(), wanted.norm(dim=1).double()
        dot = (made.double() * wanted).sum(1)
        is_directed = norm > 0  # a token of zeros has neither a direction nor a ratio
        self._directed += is_directed.sum()
        self._cosine += (dot / (made_norm * norm).clamp(min=1e-30))[is_directed].sum()
        self._ratio += (made_norm / norm.clamp(min=1e-30))[is_directed].sum()

    @property
    def l0(self) -> float:
        """Features that fire on a token, mean."""
        return float(self.fired.sum()) / self.tokens

    @property
    def fvu(self) -> float:
        """Squared errors by squared deviations from the mean: sums over all tokens, not a mean of ratios."""
        return self._errors.fvu

    @property
    def cosine(self) -> float:
        """Between a token's reconstruction and what it stands for, mean; 0 for a reconstruction of zeros."""
        return float(self._cosine / self._directed.clamp(min=1))

    @property
    def norm_ratio(self) -> float:
        """Length of a token's reconstruction by the length of what it stands for, mean; below 1 is shrinkage."""
        return float(self._ratio / self._directed.clamp(min=1))

    @property
    def dead_share(self) -> float:
        """Share of features that never fired."""
        return float((self.fired == 0).double().mean())

    @property
    def density(self) -> Tensor:
        """[d_sae] share of tokens on which each feature fired, float64."""
        return self.fired.double().cpu() / self.tokens


def read_tally(reader: Reader, x: Tensor, wanted: Tensor, tally: Tally, watch: Watch | None = None) -> Tensor:
    """x [n, d_in] -> reconstructions [n, d_out] in float32, counted and compared with ``wanted`` [n, d_out]."""
    made = torch.empty_like(wanted)
    size = max(1, VALUES // reader.d_sae)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        features = reader.encode(x[part])
        made[part] = reader.decode(features, x[part]).float()
        tally.count(features)
        if watch is not None:
            watch(features, start)
    tally.compare(made, wanted)
    return made


# Rows of tokens that the model reads together, and which of them count.


class EvaluationRow(NamedTuple):
    """One row of tokens: ids [T] int64 and bool [T], which of them are ordinary: read and replaced by the SAE."""

    ids: Tensor
    ordinary: Tensor


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """Rows padded at the end to one length: all [rows, T]."""

    ids: Tensor
    ordinary: Tensor
    """Which tokens the SAE reads and replaces: not BOS, other special tokens, padding."""
    real: Tensor
    """Which are not padding."""

    @property
    def predicted(self) -> Tensor:
        """bool [rows, T - 1]: positions whose next token is text, so that its loss counts."""
        return self.real[:, :-1] & self.real[:, 1:]

    def to(self, device: torch.device) -> EvaluationBatch:
        """The same batch elsewhere."""
        return EvaluationBatch(self.ids.to(device), self.ordinary.to(device), self.real.to(device))


def padded(rows: Sequence[EvaluationRow]) -> EvaluationBatch:
    """Rows of any lengths as one batch. A causal model sees nothing of what follows: padding may be any token."""
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    ordinary = torch.zeros(len(rows), length, dtype=torch.bool)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = row.ids
        ordinary[at, : len(row.ids)] = row.ordinary
        real[at, : len(row.ids)] = True
    return EvaluationBatch(ids, ordinary, real)


def evaluation_batches(rows: Iterable[EvaluationRow], tokens: int) -> Iterator[EvaluationBatch]:
    """Batches of at most ``tokens`` tokens with their padding, in the order of the rows; of one row at least."""
    held: list[EvaluationRow] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.ids))
        if held and longest * (len(held) + 1) > tokens:
            yield padded(held)
            held, longest = [], len(row.ids)
        held.append(row)
    if held:
        yield padded(held)


# What the model predicts, held against the text and against what it predicts as it is.


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

    def add(self, logits: Tensor, batch: EvaluationBatch, base: Tensor | None = None) -> None:
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


# How alike the directions of decoders are: within one (duplicates), and between two (agreement).


_ROWS = 2048
"""Of either side whose cosines are held at once."""
MATCHED = 8192
"""Features up to which the matching of two SAEs is exact: it needs all cosines at once, 512 MiB for so many."""
_CANDIDATES = 4
"""Nearest features that each feature of a sample brings into the matching."""


class Agreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far two dictionaries hold the same directions."""

    mcc: float
    """Mean cosine of features matched one to one so that it is largest (Hungarian method); the smaller SAE's all are
    matched, or a sample of them."""
    mean_max_cosine: float
    """Mean over the features of the first, or the sample, of the largest cosine in the second."""
    share_above_09: float
    """Share of the matched pairs with a cosine above 0.9."""
    matched: int
    """Pairs."""
    is_sample: bool
    """Whether only a random sample of the features was matched, among its nearest."""


@torch.no_grad()
def max_cosines(W_dec: Tensor, rows: Tensor | None = None) -> Tensor:
    """W_dec [d_sae, d_out] -> [n] each feature's largest cosine with another feature.

    Args:
        rows: [n] the features that are asked for; all where left out.
    """
    unit = _unit(W_dec)
    asked = torch.arange(len(unit), device=unit.device) if rows is None else rows.to(unit.device)
    return torch.cat([_best_other(unit, part) for part in torch.split(asked, _ROWS)])


@torch.no_grad()
def agreement(first: Tensor, second: Tensor, seed: int) -> Agreement:
    """Two decoders [d_sae, d_out] and [other d_sae, d_out] -> how far they hold the same directions."""
    assert first.shape[1] == second.shape[1], "checked by the caller"
    one, two = _unit(first), _unit(second)
    nearest = torch.cat([(part @ two.T).max(1).values for part in torch.split(one, _ROWS // 8)])
    if max(len(one), len(two)) <= MATCHED:
        pairs, is_sample = _matched(one, two), False
    else:
        small, large = (one, two) if len(one) <= len(two) else (two, one)
        pick = torch.randperm(len(small), generator=torch.Generator().manual_seed(seed))[: MATCHED // _CANDIDATES]
        pairs, is_sample = _matched_among_nearest(small[pick.to(small.device)], large), True
    return Agreement(
        mcc=float(pairs.mean()),
        mean_max_cosine=float(nearest.mean()),
        share_above_09=float((pairs > 0.9).double().mean()),
        matched=len(pairs),
        is_sample=is_sample,
    )


def _unit(rows: Tensor) -> Tensor:
    rows = rows.detach().float()
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length.clamp(min=1e-12)


def _best_other(unit: Tensor, rows: Tensor) -> Tensor:
    best = torch.full((len(rows),), -1.0, device=unit.device)
    for start in range(0, len(unit), _ROWS):
        cosines = unit[rows] @ unit[start : start + _ROWS].T
        own = rows - start
        is_here = (own >= 0) & (own < cosines.shape[1])
        cosines[is_here.nonzero().flatten(), own[is_here]] = -1.0
        best = torch.maximum(best, cosines.max(1).values)
    return best


def _matched(one: Tensor, two: Tensor) -> Tensor:
    """Cosines [min(n, m)] of the pairs of the best matching, float64."""
    # Here, as everything heavy: the command line asks every command to register before it knows which one runs.
    from scipy.optimize import linear_sum_assignment

    cosines = (one @ two.T).double().cpu()
    row, column = linear_sum_assignment(cosines.numpy(), maximize=True)
    return cosines[torch.from_numpy(row), torch.from_numpy(column)]


def _matched_among_nearest(sample: Tensor, large: Tensor) -> Tensor:
    """The same for a sample of the one, with only those of the other that are among some feature's nearest."""
    near = [(part @ large.T).topk(_CANDIDATES, dim=1).indices for part in torch.split(sample, _ROWS // 8)]
    is_near = torch.zeros(len(large), dtype=torch.bool, device=large.device)
    is_near[torch.cat(near).flatten()] = True
    return _matched(sample, large[is_near])


# Counts by bins.


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


# The contexts in which a few features fire most strongly, kept while the text goes by.


_BEFORE, _AFTER = 24, 12
"""Tokens shown on either side."""

Decode = Callable[[list[int]], str]
"""Token ids to text."""


class Context(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token on which the feature fired with ``value``, and the text around it."""

    before: str
    token: str
    after: str
    value: float


class FeatureExamples(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One feature; ``density`` is the share of tokens on which it fires."""

    feature: int
    density: float
    contexts: tuple[Context, ...]


def spread(density: Tensor, count: int) -> list[int]:
    """density [d_sae] -> ``count`` features that fire, evenly over the order of densities, not for their looks."""
    order = density.argsort(descending=True, stable=True)
    alive = order[: int((density > 0).sum())]
    at = torch.linspace(0, max(len(alive) - 1, 0), min(count, len(alive)), dtype=torch.float64).round().long()
    return sorted(alive[at].tolist())


class Examples:
    """The strongest tokens of some features, one of each row of text at most."""

    def __init__(self, features: list[int], contexts: int) -> None:
        self.features = features
        self._contexts = contexts
        self._found: list[list[tuple[float, int, list[int], int]]] = [[] for _ in features]
        """Per feature: value, row of text, the ids around, place of the token among them."""
        self._rows_before = 0
        self._batch: EvaluationBatch | None = None
        self._places = torch.empty(0, 2, dtype=torch.long)

    def begin(self, batch: EvaluationBatch) -> None:
        """Before a batch's features come."""
        if self._batch is not None:
            self._rows_before += len(self._batch.ids)
        self._batch, self._places = batch, batch.ordinary.nonzero()

    def watch(self, features: Tensor, start: int) -> None:
        """features [n, d_sae] of the batch's ordinary tokens from ``start`` on."""
        if not self.features:
            return
        assert self._batch is not None, "begun"
        chosen = features[:, self.features].float()
        places = self._places[start : start + len(chosen)]
        row = places[:, :1].expand_as(chosen)
        best = chosen.new_zeros(len(self._batch.ids), len(self.features)).scatter_reduce(0, row, chosen, "amax")
        values, rows = (one.T.tolist() for one in best.topk(min(self._contexts, len(best)), dim=0))
        for index, kept in enumerate(self._found):
            for value, at in zip(values[index], rows[index], strict=True):
                if value > 0 and (len(kept) < self._contexts or value > kept[-1][0]):
                    here = torch.where(places[:, 0] == at, chosen[:, index], 0.0)
                    self._keep(kept, value, at, int(places[here.argmax(), 1]))

    def shown(self, density: Tensor, decode: Decode) -> tuple[FeatureExamples, ...]:
        """density [d_sae] -> what was found, the strongest first."""
        return tuple(
            FeatureExamples(
                feature=feature,
                density=float(density[feature]),
                contexts=tuple(_context(decode, *one) for one in kept),
            )
            for feature, kept in zip(self.features, self._found, strict=True)
        )

    def _keep(self, kept: list[tuple[float, int, list[int], int]], value: float, row: int, token: int) -> None:
        assert self._batch is not None, "begun"
        text = self._rows_before + row
        same = next((one for one in kept if one[1] == text), None)
        if same is not None and same[0] >= value:
            return
        if same is not None:
            kept.remove(same)
        first = max(0, token - _BEFORE)
        real = self._batch.real[row, first : token + _AFTER + 1]
        ids = self._batch.ids[row, first : token + _AFTER + 1][real].tolist()
        kept.append((value, text, ids, token - first))
        kept.sort(key=lambda one: -one[0])
        del kept[self._contexts :]


def _context(decode: Decode, value: float, text: int, ids: list[int], at: int) -> Context:
    return Context(before=decode(ids[:at]), token=decode([ids[at]]), after=decode(ids[at + 1 :]), value=value)


# How much is measured, and on how much text.


DEAD_TOKENS = 1_000_000
"""Below this many tokens a rare feature passes for a dead one: the dead share is then an upper bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSettings:
    """One evaluation; every token count is of ordinary tokens, which special ones and padding are not.

    Raises:
        TrainError: names the field and what is allowed.
    """

    tokens: int = DEAD_TOKENS
    """On which what fires and what is reconstructed is measured."""
    loss_tokens: int = 65_536
    """Of these, on whose rows the model is run with the site replaced: four more passes of the model."""
    fit_tokens: int = 16_384
    """From every fifth of the first rows, not measured on: they give the mean that ablation puts in place, and fit the
    frozen baseline."""
    outlier_norm: float = 10.0
    """Leave out tokens whose norm is above this many times the median where the SAE reads or in what it must reproduce;
    0 keeps them."""
    examples: int = 12
    """Features whose strongest contexts are shown."""
    contexts: int = 5
    """Contexts shown of each."""
    probe_k: tuple[int, ...] = (1, 2, 5, 20)
    """Numbers of features that a probe may use."""
    seed: int = 7_001
    """Of the frozen baseline and of the probes' split."""

    def __post_init__(self) -> None:
        for name in ("tokens", "loss_tokens", "fit_tokens", "contexts"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.outlier_norm != 0 and not 1 < self.outlier_norm < inf:
            raise TrainError(f"outlier_norm must be above 1, or 0 for none, got {self.outlier_norm:g}")
        if self.examples < 0:
            raise TrainError(f"examples must be at least 0, got {self.examples}")
        if not self.probe_k or min(self.probe_k) < 1 or len(set(self.probe_k)) < len(self.probe_k):
            raise TrainError(f"probe_k must be different numbers of at least 1, got {self.probe_k}")
