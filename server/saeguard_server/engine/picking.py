"""What an inspection keeps of activations: the largest, those above a threshold, or named ones; for every engine."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from saeguard_sae.encoding import FeatureSelector, SelectedFeatures, above_of, named_of, top_of


class Wanted(Protocol):
    """Exactly one of the three is set, as in ``protocol.Pick``."""

    @property
    def top_k(self) -> int | None: ...

    @property
    def threshold(self) -> float | None: ...

    @property
    def features(self) -> tuple[int, ...] | None: ...


def of_activations(picker: FeatureSelector, x: Tensor, wanted: Wanted) -> SelectedFeatures:
    """x [N, d_in] -> what is wanted of its features."""
    if wanted.features is not None:
        return picker.named(x, wanted.features)
    if wanted.top_k is not None:
        return picker.top(x, wanted.top_k)
    assert wanted.threshold is not None, "a pick names features, a number or a threshold"
    return picker.above(x, wanted.threshold)


def of_features(features: Tensor, wanted: Wanted, *, signed: bool) -> SelectedFeatures:
    """features [N, d_sae] -> what is wanted of them; by magnitude where they can be negative (``signed``)."""
    if wanted.features is not None:
        return named_of(features, wanted.features)
    if wanted.top_k is not None:
        return top_of(features, wanted.top_k, signed=signed)
    assert wanted.threshold is not None, "a pick names features, a number or a threshold"
    return above_of(features, wanted.threshold, signed=signed)
