"""Weighted sums of features of one tensor, for the conditions of many requests: what they share is computed once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from saeguard_sae import encoding
from saeguard_sae.coders import SparseCoder
from saeguard_sae.edit_table import EDIT_COLUMNS, ColumnStore
from saeguard_sae.edits import FLOAT32_MAX
from saeguard_sae.encoding import Cells, Coders, Needs


@dataclass(frozen=True, slots=True, eq=False)
class WeightedFeature:
    """Weighted features of one coder, read at one place of the model."""

    place: Hashable
    """Where it is read, and the condition decided if it is the last: what ``ConditionTable.decide`` is given."""
    source: Hashable  # which tensor it reads there; None for the one that is edited at the place
    coder: SparseCoder
    features: tuple[int, ...]
    weights: tuple[float, ...]


Sum: TypeAlias = tuple[WeightedFeature, ...]  # of one condition at one place, from one source
_Key: TypeAlias = tuple[object, ...]  # equal where sums are; empty for one of nothing


@dataclass(frozen=True, slots=True)
class _Compiled:
    """U features and P sums: where the features' rows are, and each sum's features, one sum after another."""

    columns: dict[_Key, int]  # each sum's number
    cells: Cells  # the columns ``READ``, [1, U]
    needs: Needs
    terms: Tensor  # int64 [n], which of the U features
    weights: Tensor  # float64 [n]
    starts: Tensor
    """int64 [P + 1], where each sum's terms begin; the last sum has none: that of conditions that read nothing here."""


class FeatureSums:
    """The sums of ``slots`` requests over features of a tensor of width ``d_read``.

    Each different feature is read once for all tokens of a pass, each different sum is added up once: a policy's
    conditions cost the same whether one request has them or all.
    """

    def __init__(self, slots: int, d_read: int, device: torch.device) -> None:
        self._d_read, self._device = d_read, device
        self._coders = Coders()
        self._sums: dict[_Key, Sum] = {}
        self._slots: dict[int, list[_Key]] = {}
        self._compiled: _Compiled | None = None
        self._index = torch.zeros(slots, 1, dtype=torch.int64, device=device)

    def holds(self, slots: Sequence[int]) -> bool:
        return any(slot in self._slots for slot in slots)

    def write(self, slot: int, sums: Sequence[Sum]) -> None:
        """Gives a free slot its conditions' sums; an empty one for a condition that reads nothing here."""
        keys: list[_Key] = [tuple((id(part.coder), part.features, part.weights) for part in parts) for parts in sums]
        self._slots[slot] = keys
        self._sums |= {key: parts for key, parts in zip(keys, sums, strict=True) if key}
        if self._compiled is not None and self._compiled.columns.keys() >= self._sums.keys():
            self._point(slot, self._compiled)
        else:
            self._compiled = None

    def clear(self, slot: int) -> None:
        if self._slots.pop(slot, None) is not None:
            self._index[slot] = len(self._sums)
            # What nobody needs any more stays while nobody pays for it: who comes next often needs the same.
            if self._slots and self._sums.keys() - self._used():
                self._compiled = None

    def read(self, x: Tensor, at: slice | Tensor, used: int) -> Tensor:
        """x [B, T, d_read] in float32 of the slots ``at`` -> their first conditions' sums, float64 [B, T, <= used]."""
        compiled = self._compiled or self._compile()
        cells = compiled.cells
        scalings = encoding.input_scalings(x, compiled.needs.kinds)
        f = encoding.values(x, x @ cells["W_enc"][0].T, cells, scalings, compiled.needs, self._coders)
        # Windows skip values by multiplying them by 0, so that all must be numbers; a token whose values are none ends
        # its request anyway.
        wide = f.flatten(0, 1).T.double().nan_to_num_(0.0, FLOAT32_MAX, -FLOAT32_MAX)
        sums = functional.embedding_bag(
            compiled.terms, wide.contiguous(), compiled.starts, mode="sum", per_sample_weights=compiled.weights
        )
        return sums.T.reshape(*f.shape[:2], -1).gather(-1, self._index[at, None, :used].expand(-1, f.shape[1], -1))

    def _used(self) -> set[_Key]:
        return {key for keys in self._slots.values() for key in keys}

    def _point(self, slot: int, compiled: _Compiled) -> None:
        nothing = len(compiled.columns)
        columns = [compiled.columns.get(key, nothing) for key in self._slots[slot]]
        if len(columns) > self._index.shape[1]:
            self._index = functional.pad(self._index, (0, len(columns) - self._index.shape[1]), value=nothing)
        self._index[slot, : len(columns)] = torch.tensor(columns, device=self._device)

    def _compile(self) -> _Compiled:
        used = self._used()
        self._sums = {key: parts for key, parts in self._sums.items() if key in used}
        parts = [part for summands in self._sums.values() for part in summands]
        coders = list({id(part.coder): part.coder for part in parts}.values())
        number = {id(coder): index for index, coder in enumerate(coders)}
        numbered = np.concatenate([np.array(part.features) + (number[id(part.coder)] << 32) for part in parts])
        features, terms = np.unique(numbered, return_inverse=True)
        lengths = [sum(len(part.features) for part in summands) for summands in self._sums.values()]
        weights = np.concatenate([np.array(part.weights, np.float64) for part in parts])
        compiled = _Compiled(
            {key: column for column, key in enumerate(self._sums)},
            self._rows(coders, features),
            Needs.of(coders, self._coders),
            self._on_device(terms),
            self._on_device(weights),
            self._on_device(np.cumsum([0, *lengths])),
        )
        self._compiled = compiled
        self._index.fill_(len(self._sums))
        for slot in self._slots:
            self._point(slot, compiled)
        return compiled

    def _rows(self, coders: list[SparseCoder], features: np.ndarray) -> Cells:
        store = ColumnStore(EDIT_COLUMNS, 1, len(features), self._device, self._d_read)
        whole = []
        for index, coder in enumerate(coders):
            at = np.flatnonzero(features >> 32 == index)
            of_coder = (features[at] & 0xFFFFFFFF).tolist()
            store.write(0, encoding.feature_cells(coder, of_coder, self._coders), self._on_device(at))
            if not encoding.is_local(coder):
                whole.append((self._coders.number(coder), of_coder))
        self._coders.note(whole)
        return {name: store[name] for name in encoding.READ}

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)
