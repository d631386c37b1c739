"""What an inspection keeps of activations: the largest, those above a threshold, or named ones; for every engine."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saeguard.requests import FeatureSelection, Selection, ThresholdSelection, TopKSelection
from saeguard_sae.coders import Temporal, is_signed
from saeguard_sae.encoding import FeatureSelector, SelectedFeatures, above_of, named_of, top_of
from saeguard_sae.loading import LoadedSae


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Rows of a sparse matrix: row i holds ``indices[indptr[i]:indptr[i + 1]]`` and the same of ``values``."""

    indptr: array[int]
    indices: array[int]
    values: array[float]

    @classmethod
    def pack(cls, selected: SelectedFeatures) -> SparseRows:
        """Candidates and which of them to keep, fetched from their device."""
        ends = selected.keep.sum(dim=-1).cumsum(dim=0).tolist()
        return cls(
            array("I", [0, *ends]),
            array("I", selected.features[selected.keep].tolist()),
            array("f", selected.values[selected.keep].tolist()),
        )

    def split(self, lengths: Iterable[int]) -> list[SparseRows]:
        parts, row = [], 0
        for length in lengths:
            first, last = self.indptr[row], self.indptr[row + length]
            indptr = array("I", (end - first for end in self.indptr[row : row + length + 1]))
            parts.append(SparseRows(indptr, self.indices[first:last], self.values[first:last]))
            row += length
        return parts


class ActivationSelector:
    """Selects features with the SAEs of a process, where the activations are."""

    def __init__(self, saes: Mapping[str, LoadedSae]) -> None:
        self._saes = saes
        self._selectors: dict[str, FeatureSelector] = {}

    def select(
        self, sae: str, selection: Selection, parts: Sequence[Tensor], prefixes: Sequence[dict[str, Tensor]]
    ) -> list[SparseRows]:
        """[T, d_in] each of requests that select the same of an SAE -> what they get of their T tokens.

        Args:
            prefixes: of each request, by SAE, all its activations so far: kept here for an SAE that reads a token
                together with all before it.
        """
        coder = self._saes[sae].dictionary
        if isinstance(coder, Temporal):
            pairs = zip(parts, prefixes, strict=True)
            features = torch.cat([_encode_with_prefix(coder, x, prefix, sae) for x, prefix in pairs]).float()
            signed = is_signed(coder)
            selected = _apply(
                selection, features, partial(top_of, signed=signed), partial(above_of, signed=signed), named_of
            )
        else:
            if sae not in self._selectors:
                self._selectors[sae] = FeatureSelector(coder)
            selector = self._selectors[sae]
            selected = _apply(selection, torch.cat(list(parts)), selector.top, selector.above, selector.named)
        return SparseRows.pack(selected).split([len(x) for x in parts])


def _encode_with_prefix(coder: Temporal, x: Tensor, prefix: dict[str, Tensor], sae: str) -> Tensor:
    prefix[sae] = torch.cat([prefix[sae], x]) if sae in prefix else x.clone()
    return coder.encode(prefix[sae])[-len(x) :]


def _apply(
    selection: Selection,
    x: Tensor,
    top: Callable[[Tensor, int], SelectedFeatures],
    above: Callable[[Tensor, float], SelectedFeatures],
    named: Callable[[Tensor, Sequence[int]], SelectedFeatures],
) -> SelectedFeatures:
    match selection:
        case TopKSelection(k):
            return top(x, k)
        case ThresholdSelection(value):
            return above(x, value)
        case FeatureSelection(features):
            return named(x, [feature.feature for feature in features])
