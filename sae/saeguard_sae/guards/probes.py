"""Sums of features of one tensor, for the guards of many requests: what they have in common is computed once.

Each different feature is read once for all tokens of a pass, each different sum is added up once, and every guard is
given its own: a policy's guards cost the same whether one request has them or all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from saeguard_sae import reading
from saeguard_sae.coder import SparseCoder
from saeguard_sae.columns import ColumnStore
from saeguard_sae.edits import FLOAT32_MAX
from saeguard_sae.guards.rule import Summand
from saeguard_sae.reading import Cells, Coders, Needs

Sum: TypeAlias = tuple[Summand, ...]
"""Of one guard at one place, from one source."""
_Key: TypeAlias = tuple[object, ...]


@dataclass(slots=True, eq=False)
class _Shared:
    """A sum that some slots have; ``column`` is its place among the sums of a pass."""

    key: _Key
    summands: Sum
    users: int = 0
    column: int = -1


@dataclass(frozen=True, slots=True)
class _Compiled:
    """U features and P sums: where the features' rows are, and each sum's features, one sum after another."""

    cells: Cells
    """The columns ``READ``, [1, U]."""
    needs: Needs
    terms: Tensor
    """int64 [n], which of the U features."""
    weights: Tensor
    """float64 [n]"""
    starts: Tensor
    """int64 [P + 1], where each sum's terms begin; the last sum has none: that of guards that read nothing here."""


class Probes:
    """The sums of ``slots`` requests over features of a tensor of width ``d_read``."""

    def __init__(self, slots: int, d_read: int, device: torch.device) -> None:
        self._d_read, self._device = d_read, device
        self._coders = Coders()
        self._known: dict[_Key, _Shared] = {}
        self._slots: dict[int, list[_Shared | None]] = {}
        self._compiled: _Compiled | None = None
        self._index = torch.zeros(slots, 1, dtype=torch.int64, device=device)

    def holds(self, slots: Sequence[int]) -> bool:
        """Whether any of these slots has a sum here."""
        return any(slot in self._slots for slot in slots)

    def write(self, slot: int, sums: Sequence[Sum]) -> None:
        """Gives a free slot its guards' sums; an empty one for a guard that reads nothing here."""
        found = [self._share(one) if one else None for one in sums]
        self._slots[slot] = found
        if self._compiled is not None:
            self._point(slot)

    def clear(self, slot: int) -> None:
        """Frees the slot."""
        if slot not in self._slots:
            return
        self._index[slot] = len(self._known)
        for one in self._slots.pop(slot):
            if one is not None:
                one.users -= 1
                # What nobody wants any more is kept while nobody pays for it: who comes next often wants the same.
                if not one.users and self._slots:
                    self._compiled = None

    def read(self, x: Tensor, at: slice | Tensor, used: int) -> Tensor:
        """x [B, T, d_read] in float32 of the slots ``at`` -> float64 [B, T, n], the sums of their first guards.

        Args:
            used: as many guards as the fullest of them has; n is less where later ones read nothing here.
        """
        compiled = self._compiled or self._compile()
        cells = compiled.cells
        framed = reading.frames(x, compiled.needs.kinds)
        f = reading.values(x, x @ cells["W_enc"][0].T, cells, framed, compiled.needs, self._coders)
        # Windows skip values by multiplying them by 0, so that all must be numbers; a token whose values are none ends
        # its request anyway.
        wide = f.flatten(0, 1).T.double().nan_to_num_(0.0, FLOAT32_MAX, -FLOAT32_MAX)
        sums = functional.embedding_bag(
            compiled.terms, wide.contiguous(), compiled.starts, mode="sum", per_sample_weights=compiled.weights
        )
        found = sums.T.reshape(*f.shape[:2], -1)
        return found.gather(-1, self._index[at, None, :used].expand(-1, f.shape[1], -1))

    def _share(self, summands: Sum) -> _Shared:
        key: _Key = tuple((id(one.coder), one.features, one.weights) for one in summands)
        if key not in self._known:
            self._known[key] = _Shared(key, summands)
            self._compiled = None
        self._known[key].users += 1
        return self._known[key]

    def _point(self, slot: int) -> None:
        """Where a slot's guards find their sums."""
        found, none = self._slots[slot], len(self._known)
        if len(found) > self._index.shape[1]:
            self._index = functional.pad(self._index, (0, len(found) - self._index.shape[1]), value=none)
        columns = [none if one is None else one.column for one in found]
        self._index[slot, : len(found)] = torch.tensor(columns, device=self._device)

    def _compile(self) -> _Compiled:
        """After sums came or went."""
        self._known = {key: one for key, one in self._known.items() if one.users}
        for column, one in enumerate(self._known.values()):
            one.column = column
        every = [(one, part) for one in self._known.values() for part in one.summands]
        coders = list({id(part.coder): part.coder for _, part in every}.values())
        number = {id(coder): index for index, coder in enumerate(coders)}
        named = np.concatenate([np.array(part.features) + (number[id(part.coder)] << 32) for _, part in every])
        features, terms = np.unique(named, return_inverse=True)
        lengths = [sum(len(part.features) for part in one.summands) for one in self._known.values()]
        weights = np.concatenate([np.array(part.weights, np.float64) for _, part in every])
        compiled = _Compiled(
            self._rows(coders, features),
            Needs.of(coders, self._coders),
            self._on_device(terms),
            self._on_device(weights),
            self._on_device(np.cumsum([0, *lengths])),
        )
        self._compiled = compiled
        self._index.fill_(len(self._known))
        for slot in self._slots:
            self._point(slot)
        return compiled

    def _rows(self, coders: list[SparseCoder], features: np.ndarray) -> Cells:
        """The columns [1, U] of features, each numbered by its coder's place in the list and its own, in order."""
        store = ColumnStore(1, len(features), self._d_read, 0, self._device)
        whole = []
        for index, coder in enumerate(coders):
            at = np.flatnonzero(features >> 32 == index)
            mine = (features[at] & 0xFFFFFFFF).tolist()
            store.write(0, self._on_device(at), reading.rows(coder, mine, self._coders))
            if not reading.is_local(coder):
                whole.append((self._coders.number(coder), mine))
        self._coders.note(whole)
        return {name: store[name] for name in reading.READ}

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)
