"""The columns of a table that read the same tensor: how features are read from it, and what their edits change.

Per step there is only index arithmetic on whole tensors: no loop over rows or edits, no transfer to the host. The
encoder and decoder rows of a slot's features are copied in once, so the cost does not depend on d_sae.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from saeguard_sae import reading
from saeguard_sae.coder import SparseCoder
from saeguard_sae.columns import COLUMNS, Column, ColumnStore, Counts
from saeguard_sae.reading import Cells, Coders, Needs
from saeguard_sae.rows import Group, as_index
from saeguard_sae.shared import Product

_TINY = 1e-30
_REMEMBERED = 32
"""Sets of slots whose columns are kept at hand: a decode step's, and those of the prompts being read."""

COUNTERS = ("eligible", "edited", "capped", "sum", "max", "relative")

Tally: TypeAlias = dict[str, Tensor]
"""The counters [columns] of one slot by name."""


class Change(NamedTuple):
    """What a bank does to a group's tokens: sizes [B, T, E], and the sums of its edits [B, T, width]."""

    f: Tensor
    eligible: Tensor
    size: Tensor
    changed: Tensor
    made: Tensor
    """Where an edit is made, whether or not it changes the value."""
    delta: Tensor
    """Of the edits that a limit may shorten."""
    free: Tensor | None
    """Of the others; None where there are none."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """What a slot's columns need."""

    used: int
    cells: Cells
    """Every column [used, ...], as it is before anything was counted."""
    needs: Needs
    whole: tuple[tuple[int, tuple[int, ...]], ...]
    """Numbers of coders, each with its features."""
    is_guarded: bool
    """Whether an edit waits for a guard."""
    is_free: bool
    """Whether an edit must not be shortened."""


class _Live(NamedTuple):
    """What some slots need; found once for each change of who is here, not every step."""

    used: int
    at: slice | Tensor
    """The slots, as an index."""
    cells: Cells
    """Their columns: views of the table where the slots lie together, else copies."""
    needs: Needs
    product: Product
    is_guarded: bool
    is_free: bool


class Bank:
    """Columns of ``slots`` requests that read a tensor of width ``d_read`` and write one of ``d_write``."""

    def __init__(self, slots: int, d_read: int, d_write: int, device: torch.device, capacity: int) -> None:
        self._columns = ColumnStore(slots, capacity, d_read, d_write, device)
        self._d_read, self._width = d_read, d_write
        self._made: dict[tuple[object, ...], _Slot] = {}
        self._slots: dict[int, _Slot] = {}
        self._coders = Coders()
        self._writers: list[tuple[SparseCoder, int, Tensor | None]] = []
        self._live: dict[tuple[int, ...], _Live] = {}

    def used(self, slots: tuple[int, ...]) -> int:
        """Columns that the fullest of these slots has."""
        return max((self._slots[slot].used for slot in slots if slot in self._slots), default=0)

    def write(self, slot: int, columns: Sequence[Column]) -> None:
        """Gives a free slot its columns, in this order. A policy's come with every request: they are made once."""
        key = tuple(map(_key, columns))
        if key not in self._made:
            if len(self._made) >= _REMEMBERED:
                self._made.clear()
            self._made[key] = self._make(columns)
        if len(columns) > self._columns.capacity:
            self._columns.grow(len(columns))
        self._slots[slot] = self._made[key]
        self._columns.fill(slot, self._made[key].cells)
        self._note_change()

    def clear(self, slot: int) -> None:
        """Frees the slot; nothing of its request stays."""
        if self._slots.pop(slot, None) is not None:
            self._columns.clear(slot)
            self._note_change()

    def at(self, slots: tuple[int, ...]) -> slice | Tensor:
        """These slots as an index."""
        return self._needs(slots).at

    def change(self, x: Tensor, group: Group, held: Tensor | None, *, is_limited: bool) -> Change:
        """x [B, T, d_read] in float32 -> what this bank's edits add to the tensor that is written.

        Args:
            held: bool [B, T, 1 + guards], after one that is always on.
            is_limited: whether any of these requests has a limit.
        """
        live = self._needs(group.slots)
        cells = live.cells
        framed = reading.frames(x, live.needs.kinds)
        f = reading.values(x, live.product.read(x), cells, framed, live.needs, self._coders)
        eligible = _eligible(group.positions, group.special, cells)
        applied = eligible
        if live.is_guarded:
            assert held is not None, "an edit waits for a guard that nobody decides"
            applied = eligible & held.gather(-1, cells["guard"][:, None].expand_as(f))
        change = torch.where(applied, _target(f, cells) - f, 0.0)
        size = change if framed is None else change * reading.pick(framed[2], cells["restores"])
        made = applied & cells["made"][:, None]
        written = torch.where(made, size, 0.0)
        delta, free = written, None
        if is_limited and live.is_free:
            limited = cells["limited"][:, None]
            delta, free = torch.where(limited, written, 0.0), live.product.write(torch.where(limited, 0.0, written))
        norm = size.abs() * cells["norm"][:, None]
        return Change(f, eligible, norm, change != 0, made, live.product.write(delta), free)

    def count(self, slots: tuple[int, ...], change: Change, norm: Tensor, shrink: Tensor | None) -> None:
        """Adds up a step; [B, T]: ``norm`` of the tokens that were written, and what limits left of the edits."""
        live = self._needs(slots)
        inside, relative = torch.where(change.eligible, change.f, 0.0), change.size / norm.clamp_min(_TINY)[..., None]
        amounts = {"eligible": change.eligible, "edited": change.changed, "sum": inside}
        if shrink is not None:
            limited, left = live.cells["limited"][:, None], shrink[..., None]
            relative = torch.where(limited, relative * left, relative)
            amounts["capped"] = change.made & limited & (left < 1)
        for name, amount in (amounts | {"relative": relative}).items():
            column = self._columns[name]
            column[live.at, : live.used] += amount[:, 0] if amount.shape[1] == 1 else amount.sum(1, dtype=column.dtype)
        largest, most = self._columns["max"], inside[:, 0] if inside.shape[1] == 1 else inside.amax(dim=1)
        largest[live.at, : live.used] = torch.maximum(largest[live.at, : live.used], most)

    def tally(self, slot: int) -> Tally:
        """What the slot's columns counted so far; stays on the device."""
        used = self.used((slot,))
        return {name: self._columns[name][slot, :used].clone() for name in COUNTERS}

    def resume(self, slot: int, tally: Tally) -> None:
        """Goes on counting from there."""
        for name, counted in tally.items():
            self._columns[name][slot, : len(counted)] = counted

    def counts(self, slot: int) -> list[Counts]:
        """What each of the slot's columns did, in their order. Waits for the device."""
        used = self.used((slot,))
        cells = zip(*(self._columns[name][slot, :used].tolist() for name in COUNTERS), strict=True)
        return [
            Counts(eligible, edited, capped, total / max(eligible, 1), largest, relative / max(eligible, 1))
            for eligible, edited, capped, total, largest, relative in cells
        ]

    def _needs(self, slots: tuple[int, ...]) -> _Live:
        if slots not in self._live:
            if len(self._live) >= _REMEMBERED:
                self._live.clear()
            self._live[slots] = self._look_up(slots)
        return self._live[slots]

    def _look_up(self, slots: tuple[int, ...]) -> _Live:
        here = [self._slots[slot] for slot in slots if slot in self._slots]
        used, at = self.used(slots), as_index(slots, self._columns.device)
        cells = {name: self._columns[name][at, :used] for name in _LIVE}
        return _Live(
            used,
            at,
            cells,
            reduce(or_, (one.needs for one in here), Needs()),
            Product.of(self._columns["W_enc"], self._columns["W_dec"], at, cells["row"]),
            is_guarded=any(one.is_guarded for one in here),
            is_free=any(one.is_free for one in here),
        )

    def _note_change(self) -> None:
        """After a request came or went: whom the features of each dictionary compete with."""
        self._live.clear()
        self._coders.note(pair for one in self._slots.values() for pair in one.whole)

    def _make(self, columns: Sequence[Column]) -> _Slot:
        store = ColumnStore(1, len(columns), self._d_read, self._width, self._columns.device)
        store.fill(0, self._own(columns))
        groups: dict[int, list[int]] = {}
        for index, column in enumerate(columns):
            groups.setdefault(self._writer(column), []).append(index)
        whole = []
        for number, found in groups.items():
            features, coder = [columns[index].feature for index in found], self._writers[number][0]
            store.write(0, torch.tensor(found, device=store.device), self._rows(number, features))
            if not reading.is_local(coder):
                whole.append((self._coders.number(coder), tuple(features)))
        return _Slot(
            len(columns),
            {name: store[name][0] for name in COLUMNS},
            Needs.of((self._writers[number][0] for number in groups), self._coders),
            tuple(whole),
            is_guarded=any(one.guard is not None for one in columns),
            is_free=any(not one.is_limited for one in columns),
        )

    def _own(self, columns: Sequence[Column]) -> Cells:
        """What a column has of its own."""
        cells: dict[str, list[float] | list[int] | list[bool]] = {
            "alpha": [one.affine.alpha for one in columns],
            "beta": [one.affine.beta for one in columns],
            "lo": [one.affine.lo for one in columns],
            "hi": [one.affine.hi for one in columns],
            "first": [one.first for one in columns],
            "last": [one.last for one in columns],
            "special": [one.special for one in columns],
            "guard": [0 if one.guard is None else one.guard + 1 for one in columns],
            "made": [not one.is_shadow for one in columns],
            "limited": [one.is_limited for one in columns],
        }
        return {name: torch.tensor(values, device=self._columns.device) for name, values in cells.items()}

    def _rows(self, number: int, features: list[int]) -> Cells:
        """What columns have from the weights of the coder that they share."""
        coder, block, gain = self._writers[number]
        cells = reading.rows(coder, features, self._coders)
        chosen = cells["feature"]
        row = coder.W_dec[chosen, block * self._width : (block + 1) * self._width].float()
        row = row if gain is None else row * gain
        return cells | {"W_dec": row, "norm": row.norm(dim=1), "row": chosen + (number << 32)}

    def _writer(self, column: Column) -> int:
        """The number of what the column has its rows from."""
        for number, (coder, block, gain) in enumerate(self._writers):
            if coder is column.coder and block == column.block and gain is column.write_gain:
                return number
        self._writers.append((column.coder, column.block, column.write_gain))
        return len(self._writers) - 1


_LIVE = (
    *(name for name in reading.READ if name != "W_enc"),
    *("alpha", "beta", "lo", "hi", "norm", "first", "last", "special", "guard", "made", "limited", "row"),
)


def _key(column: Column) -> tuple[object, ...]:
    """Equal where columns are; the bank keeps the coders and gains, so that their ids stay theirs."""
    return (
        id(column.coder), id(column.write_gain), column.block, column.feature, column.affine, column.first, column.last,
        column.special, column.guard, column.is_shadow, column.is_limited,
    )  # fmt: skip


def _target(f: Tensor, cells: Cells) -> Tensor:
    alpha, beta, lo, hi = (cells[name][:, None] for name in ("alpha", "beta", "lo", "hi"))
    return torch.minimum(torch.maximum(alpha * f + beta, lo), hi)


def _eligible(positions: Tensor, special: Tensor, cells: Cells) -> Tensor:
    """bool [B, T, E], True where the edit's scope holds the token."""
    position = positions[..., None]
    inside = (position >= cells["first"][:, None]) & (position < cells["last"][:, None])
    return inside & (cells["special"][:, None] | ~special[..., None])
