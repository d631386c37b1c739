"""Which features fire on the tokens of one forward pass: encoded whole, picked on the device, sparse on the host."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from saeguard_sae.coders import Temporal, is_signed
from saeguard_sae.edit_table import RowSpan
from saeguard_sae.encoding import FeatureSelector, SelectedFeatures
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Site
from saeguard_server.engine.picking import of_activations, of_features
from saeguard_server.engine.protocol import InspectTask, Pick
from saeguard_server.engine.transformers.scheduler import PromptPart


@dataclass(frozen=True, slots=True)
class Sparse:
    """Rows of a sparse matrix: row i holds ``indices[indptr[i]:indptr[i + 1]]``."""

    indptr: array[int]
    indices: array[int]
    values: array[float]


Found: TypeAlias = dict[tuple[int, str], Sparse | Exception]
"""By request and SAE, what was picked on the last pass' part of it, or what went wrong."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One pick of one part: rows ``[start, end)`` of what is kept at its SAE's site."""

    part: PromptPart
    pick: Pick
    start: int
    end: int


class Capture:
    """What the forward passes show of the SAEs that somebody inspects.

    Whoever asks the same of an SAE in one pass shares one product with its encoder, and one transfer to the host.
    """

    def __init__(self, saes: Mapping[str, LoadedSae]) -> None:
        self._saes = saes
        self._tokens = torch.zeros(0, dtype=torch.int64)
        self._asked: list[_Asked] = []
        self._seen: dict[Site, Tensor] = {}
        self._pickers: dict[str, FeatureSelector] = {}
        self._sites: set[Site] = set()

    def begin(self, parts: Many[PromptPart], spans: Many[RowSpan]) -> Callable[[Site, Tensor], None] | None:
        """Before a pass that reads these parts: what to call with each site's activations; None where none asks."""
        self._asked, self._seen = [], {}
        kept: list[Tensor] = []
        row = 0
        for part, span in zip(parts, spans, strict=True):
            if isinstance(part.sequence.task, InspectTask):
                kept.append(torch.arange(span.start, span.start + span.length))
                end = row + span.length
                self._asked += [_Asked(part, pick, row, end) for pick in part.sequence.task.picks]
                row = end
        if not kept:
            return None
        self._tokens = torch.cat(kept)
        self._sites = {self._saes[one.pick.sae].site for one in self._asked}
        return self._see

    def results(self) -> Found:
        """What the last pass showed; once."""
        groups: dict[Pick, list[_Asked]] = defaultdict(list)
        for one in self._asked:
            groups[one.pick].append(one)
        found: Found = {}
        for pick, asked in groups.items():
            try:
                parts: Many[Sparse | Exception] = self._choose(pick, asked)
            except Exception as err:  # one request's activations must not end another's
                parts = [err] * len(asked)
            found.update({(one.part.sequence.uid, pick.sae): part for one, part in zip(asked, parts, strict=True)})
        self._asked, self._seen = [], {}
        return found

    def _see(self, site: Site, x: Tensor) -> None:
        """x [N, width] at ``site``, before its edits. Copied: the model goes on to use its memory for other things."""
        if site in self._sites:
            self._seen[site] = x[self._tokens.to(x.device)]

    def _choose(self, pick: Pick, asked: list[_Asked]) -> list[Sparse]:
        sae = self._saes[pick.sae]
        parts = [self._seen[sae.site][one.start : one.end] for one in asked]
        if isinstance(sae.dictionary, Temporal):
            encoded = [_with_prefix(sae.dictionary, one, x) for one, x in zip(asked, parts, strict=True)]
            found = of_features(torch.cat(encoded), pick, signed=is_signed(sae.dictionary))
        else:
            found = of_activations(self._picker(sae), torch.cat(parts), pick)
        return _split(_pack(found), [len(x) for x in parts])

    def _picker(self, sae: LoadedSae) -> FeatureSelector:
        if sae.name not in self._pickers:
            self._pickers[sae.name] = FeatureSelector(sae.dictionary)
        return self._pickers[sae.name]


def _with_prefix(temporal: Temporal, asked: _Asked, x: Tensor) -> Tensor:
    """A temporal SAE reads a token together with everything before it, whatever part that came in."""
    before = asked.part.sequence.prefix
    whole = torch.cat([before[asked.pick.sae], x]) if asked.pick.sae in before else x
    before[asked.pick.sae] = whole
    return temporal.encode(whole)[-len(x) :]


def _split(whole: Sparse, lengths: list[int]) -> list[Sparse]:
    """Rows one after the other -> so many for each."""
    found, row = [], 0
    for length in lengths:
        first, last = whole.indptr[row], whole.indptr[row + length]
        indptr = array("I", (one - first for one in whole.indptr[row : row + length + 1]))
        found.append(Sparse(indptr, whole.indices[first:last], whole.values[first:last]))
        row += length
    return found


def _pack(picked: SelectedFeatures) -> Sparse:
    """Candidates and which to keep -> rows of a sparse matrix."""
    ends = picked.keep.sum(dim=-1).cumsum(dim=0).tolist()
    return Sparse(
        array("I", [0, *ends]),
        array("I", picked.features[picked.keep].tolist()),
        array("f", picked.values[picked.keep].tolist()),
    )
