"""The contexts in which a few features fire most strongly, kept while the text goes by."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from saeguard_sae.train.quality.batch import Batch

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
        self._batch: Batch | None = None
        self._places = torch.empty(0, 2, dtype=torch.long)

    def begin(self, batch: Batch) -> None:
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
