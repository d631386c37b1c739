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

from saeguard_sae.coder import is_signed
from saeguard_sae.loading import LoadedSae
from saeguard_sae.rows import Span
from saeguard_sae.site import Site
from saeguard_sae.temporal import Temporal
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
        self._sites: set[Site] = set()

    def begin(self, parts: Many[PromptPart], spans: Many[Span]) -> Callable[[Site, Tensor], None] | None:
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
        x = self._seen[sae.site]
        if isinstance(sae.dictionary, Temporal):
            features = torch.cat([_with_prefix(sae.dictionary, one, x[one.start : one.end]) for one in asked])
        else:
            features = sae.dictionary.encode(torch.cat([x[one.start : one.end] for one in asked]))
        whole = choose(features.float(), pick, signed=is_signed(sae.dictionary))
        return _split(whole, [one.end - one.start for one in asked])


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


def choose(features: Tensor, pick: Pick, *, signed: bool = False) -> Sparse:
    """features [T, d_sae] -> the picked ones, largest first; in the order asked for when they were named.

    Features that can be negative (``signed``) are picked by magnitude.
    """
    if pick.features is not None:
        index = torch.tensor(pick.features, device=features.device).expand(features.shape[0], -1)
        return _pack(features.gather(1, index), index, torch.ones_like(index, dtype=torch.bool))
    size = features.abs() if signed else features
    if pick.top_k is not None:
        index = size.topk(min(pick.top_k, features.shape[1]), dim=-1).indices
        values = features.gather(1, index)
        return _pack(values, index, values != 0)
    assert pick.threshold is not None, "a pick names features, a number or a threshold"
    most = int((size > pick.threshold).sum(dim=-1).max())
    sizes, index = size.topk(most, dim=-1)
    return _pack(features.gather(1, index), index, sizes > pick.threshold)


def _pack(values: Tensor, index: Tensor, keep: Tensor) -> Sparse:
    """[T, n] candidates and which to keep -> rows of a sparse matrix."""
    ends = keep.sum(dim=-1).cumsum(dim=0).tolist()
    return Sparse(
        array("I", [0, *ends]),
        array("I", index[keep].tolist()),
        array("f", values[keep].tolist()),
    )
