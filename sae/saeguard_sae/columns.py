"""One column of an edit table, and the tensors behind all: [slots, capacity, ...], grown and cleared together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saeguard_sae.coder import SparseCoder
from saeguard_sae.edits import IDENTITY, Affine


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One edit of one feature for one slot, on tokens at positions ``[first, last)``; by default it only reads."""

    coder: SparseCoder
    feature: int
    affine: Affine = IDENTITY
    first: int = 0
    last: int = 0
    special: bool = False
    """Also on special tokens."""
    source: Hashable = None
    """Which tensor it reads (a key of ``sources`` in ``EditTable.apply``); None for the one that is edited."""
    block: int = 0
    """Which of the vectors that its decoder row holds side by side is written here."""
    write_gain: Tensor | None = None
    """[width] multiplies what is written."""
    guard: int | None = None
    """Number of the slot's guard that must be on; None is always."""
    is_shadow: bool = False
    """Counted as if it were made, and not made."""
    is_limited: bool = True
    """Whether the slot's limit on ``|edit| / |x|`` counts and shortens it."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What one column did so far, over the tokens in its scope."""

    eligible: int
    edited: int
    capped: int
    mean_activation: float
    max_activation: float
    mean_relative_edit: float


@dataclass(frozen=True, slots=True)
class Kind:
    """What one column holds: value when idle, dtype, and for vectors whether they are as wide as what is read or
    written."""

    idle: float | int | bool
    dtype: torch.dtype = torch.float32
    width: Literal["scalar", "read", "write"] = "scalar"


COLUMNS: dict[str, Kind] = {
    # How a feature is read: f = relu(gain * q + bias) where q + gate > threshold, tanh of it where squashed, with
    # q = (x . W_enc - shift * total) / divisor; shift and divisor are the token's under the SAE's normalisation.
    "W_enc": Kind(0.0, width="read"),
    "total": Kind(0.0),
    "normalisation": Kind(0, torch.int64),
    "gain": Kind(0.0),
    "bias": Kind(0.0),
    "gate": Kind(0.0),
    "threshold": Kind(torch.inf),
    "squashed": Kind(False, torch.bool),
    # Features that need more than themselves: their dictionary's number from 1, 0 for none, and their index in it.
    "whole": Kind(0, torch.int64),
    "feature": Kind(0, torch.int64),
    # What it becomes: f' = min(max(alpha * f + beta, lo), hi), and how the difference is written: times W_dec and the
    # token's scale under the normalisation that is taken back.
    "alpha": Kind(1.0),
    "beta": Kind(0.0),
    "lo": Kind(-torch.inf),
    "hi": Kind(torch.inf),
    "W_dec": Kind(0.0, width="write"),
    "norm": Kind(0.0),
    "restores": Kind(0, torch.int64),
    # Which tokens: positions [first, last), special ones only when asked.
    "first": Kind(0, torch.int64),
    "last": Kind(0, torch.int64),
    "special": Kind(False, torch.bool),
    # Where the slot's guard with this number, from 1, is on (0: always); whether it is made, and may be shortened.
    "guard": Kind(0, torch.int64),
    "made": Kind(False, torch.bool),
    "limited": Kind(False, torch.bool),
    # Columns that read and write the same have the same number.
    "row": Kind(-1, torch.int64),
    # What happened, over eligible tokens: the receipt's numbers.
    "eligible": Kind(0, torch.int64),
    "edited": Kind(0, torch.int64),
    "capped": Kind(0, torch.int64),
    "sum": Kind(0.0, torch.float64),
    "max": Kind(0.0),
    "relative": Kind(0.0, torch.float64),
}


class ColumnStore:
    """All columns of ``slots`` requests with room for ``capacity`` edits each, idle at first."""

    def __init__(self, slots: int, capacity: int, d_read: int, d_write: int, device: torch.device) -> None:
        self.slots, self.capacity, self.device = slots, capacity, device
        self._shapes: dict[str, tuple[int, ...]] = {"scalar": (), "read": (d_read,), "write": (d_write,)}
        self._tensors = self._make(capacity)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def write(self, slot: int, at: Tensor, cells: Mapping[str, Tensor]) -> None:
        """Fills the cells ``at`` int64 [n] of a slot: [n, ...] each."""
        for name, values in cells.items():
            self._tensors[name][slot].index_copy_(0, at, values.to(self._tensors[name].dtype))

    def fill(self, slot: int, cells: Mapping[str, Tensor]) -> None:
        """Gives a slot the n cells [n, ...] of every column."""
        for name, values in cells.items():
            self._tensors[name][slot, : len(values)] = values

    def clear(self, slot: int) -> None:
        """Makes a slot's cells idle."""
        for name, kind in COLUMNS.items():
            self._tensors[name][slot] = kind.idle

    def grow(self, needed: int) -> None:
        """Doubles the capacity until ``needed`` cells fit; what is there stays."""
        old = self._tensors
        while self.capacity < needed:
            self.capacity *= 2
        self._tensors = self._make(self.capacity)
        for name, tensor in old.items():
            self._tensors[name][:, : tensor.shape[1]] = tensor

    def _make(self, capacity: int) -> dict[str, Tensor]:
        def make(kind: Kind) -> Tensor:
            shape = (self.slots, capacity, *self._shapes[kind.width])
            return torch.full(shape, kind.idle, dtype=kind.dtype, device=self.device)

        return {name: make(kind) for name, kind in COLUMNS.items()}
