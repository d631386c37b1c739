"""The columns of a table that read the same tensor: how features are read from it, and what their edits change.

Per step there is only index arithmetic on whole tensors: no loop over rows or edits, no transfer to the host. The
encoder and decoder rows of a slot's features are copied in once, so the cost does not depend on d_sae. Features that
compete (TopK and its kin) also need their rank: see ``ranking``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from saeguard_sae.activations import TanhReLU
from saeguard_sae.coder import SparseCoder
from saeguard_sae.columns import Column, ColumnStore, Counts
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.normalisation import NORMALISATIONS, frame
from saeguard_sae.pursuit import MatchingPursuit
from saeguard_sae.ranking import Rivals
from saeguard_sae.rows import Group
from saeguard_sae.selections import GroupMax
from saeguard_sae.temporal import Temporal

_TINY = 1e-30
_REMEMBERED = 32
"""Sets of slots whose columns are kept at hand: a decode step's, and those of the prompts being read."""

COUNTERS = ("eligible", "edited", "capped", "sum", "max", "relative")

Tally: TypeAlias = dict[str, Tensor]
"""The counters [columns] of one slot by name."""


class Change(NamedTuple):
    """What a bank does to a group's tokens: sizes [B, T, E], and the sum of its edits [B, T, width]."""

    f: Tensor
    eligible: Tensor
    size: Tensor
    changed: Tensor
    delta: Tensor


class _Live(NamedTuple):
    """What some slots need; found once for each change of who is here, not every step."""

    used: int
    at: slice | Tensor
    """The slots, as an index."""
    cells: dict[str, Tensor]
    """Their columns: views of the table where the slots lie together, else copies."""
    kinds: frozenset[str]
    """Normalisations of their SAEs."""
    whole: tuple[int, ...]
    """Numbers of the coders of which more than one row is needed."""
    is_squashed: bool
    """Whether any feature goes through tanh."""


class Bank:
    """Columns of ``slots`` requests that read a tensor of width ``d_read`` and write one of ``d_write``."""

    def __init__(self, slots: int, d_read: int, d_write: int, device: torch.device, capacity: int) -> None:
        self._columns = ColumnStore(slots, capacity, d_read, d_write, device)
        self._width = d_write
        self._cells: dict[int, list[Column]] = {}
        self._whole: list[SparseCoder] = []
        self._rivals: dict[int, Rivals] = {}
        self._live: dict[tuple[int, ...], _Live] = {}

    def used(self, slots: tuple[int, ...]) -> int:
        """Columns that the fullest of these slots has."""
        return max((len(self._cells[slot]) for slot in slots if slot in self._cells), default=0)

    def write(self, slot: int, columns: Sequence[Column]) -> None:
        """Gives a free slot its columns, in this order."""
        if len(columns) > self._columns.capacity:
            self._columns.grow(len(columns))
        for index, column in enumerate(columns):
            self._write_cell(slot, index, column)
        self._cells[slot] = list(columns)
        self._note_change()

    def clear(self, slot: int) -> None:
        """Frees the slot; nothing of its request stays."""
        if self._cells.pop(slot, None) is not None:
            self._columns.clear(slot)
            self._note_change()

    def at(self, slots: tuple[int, ...]) -> slice | Tensor:
        """These slots as an index."""
        return self._needs(slots).at

    def change(self, x: Tensor, group: Group) -> Change:
        """x [B, T, d_read] in float32 -> what this bank's edits add to the tensor that is written."""
        needs = self._needs(group.slots)
        cells = needs.cells
        frames = _frames(x, needs.kinds)
        f = self._read(x, cells, frames, needs)
        eligible = _eligible(group.positions, group.special, cells)
        change = torch.where(eligible, _target(f, cells) - f, 0.0)
        size = change if frames is None else change * _pick(frames[2], cells["restores"])
        delta = torch.bmm(size, cells["W_dec"])
        return Change(f, eligible, size.abs() * cells["norm"][:, None], change != 0, delta)

    def count(self, slots: tuple[int, ...], change: Change, shrink: Tensor, norm: Tensor, capped: Tensor) -> None:
        """Adds up a step; ``shrink``, ``norm`` (of the tokens that were written) and ``capped`` are [B, T]."""
        needs = self._needs(slots)
        inside = torch.where(change.eligible, change.f, 0.0)
        for name, amount in (
            ("eligible", change.eligible),
            ("edited", change.changed),
            ("capped", change.eligible & capped[..., None]),
            ("sum", inside),
            ("relative", change.size * (shrink / norm.clamp_min(_TINY))[..., None]),
        ):
            column = self._columns[name]
            column[needs.at, : needs.used] += amount.sum(dim=1, dtype=column.dtype)
        largest = self._columns["max"]
        largest[needs.at, : needs.used] = torch.maximum(largest[needs.at, : needs.used], inside.amax(dim=1))

    def tally(self, slot: int) -> Tally:
        """What the slot's columns counted so far; stays on the device."""
        used = len(self._cells.get(slot, ()))
        return {name: self._columns[name][slot, :used].clone() for name in COUNTERS}

    def resume(self, slot: int, tally: Tally) -> None:
        """Goes on counting from there."""
        for name, counted in tally.items():
            self._columns[name][slot, : len(counted)] = counted

    def counts(self, slot: int) -> list[Counts]:
        """What each of the slot's columns did, in their order. Waits for the device."""
        used = len(self._cells.get(slot, ()))
        cells = zip(*(self._columns[name][slot, :used].tolist() for name in COUNTERS), strict=True)
        return [
            Counts(eligible, edited, capped, total / max(eligible, 1), largest, relative / max(eligible, 1))
            for eligible, edited, capped, total, largest, relative in cells
        ]

    def _read(self, x: Tensor, cells: dict[str, Tensor], frames: Tensor | None, needs: _Live) -> Tensor:
        """[B, T, E] the value of each slot's features."""
        q = torch.bmm(x, cells["W_enc"].transpose(1, 2))
        if frames is not None:
            kind = cells["normalisation"]
            q = (q - _pick(frames[0], kind) * cells["total"][:, None]) / _pick(frames[1], kind)
        pre = q * cells["gain"][:, None] + cells["bias"][:, None]
        f = pre.relu() * (q + cells["gate"][:, None] > cells["threshold"][:, None])
        if needs.is_squashed:
            f = torch.where(cells["squashed"][:, None], f.tanh(), f)
        for number in needs.whole:
            mine = (cells["whole"] == number)[:, None].expand_as(f)
            index = torch.where(mine, cells["feature"][:, None], -1)
            f = torch.where(mine, self._read_whole(number, x, index, torch.where(mine, pre, 0.0)), f)
        return f

    def _read_whole(self, number: int, x: Tensor, index: Tensor, pre: Tensor) -> Tensor:
        """The features ``index`` [B, T, E] (-1 for none) of a coder that one row does not tell."""
        coder = self._whole[number - 1]
        if number not in self._rivals:
            return coder.encode(x).float().gather(-1, index.clamp_min(0))
        flat = self._rivals[number].read(x.flatten(0, 1), index.flatten(0, 1), pre.flatten(0, 1))
        return flat.view_as(index)

    def _needs(self, slots: tuple[int, ...]) -> _Live:
        if slots not in self._live:
            if len(self._live) >= _REMEMBERED:
                self._live.clear()
            self._live[slots] = self._look_up(slots)
        return self._live[slots]

    def _look_up(self, slots: tuple[int, ...]) -> _Live:
        columns = [column for slot in slots for column in self._cells.get(slot, ())]
        kinds = frozenset(one.coder.normalisation for one in columns if not isinstance(one.coder, Temporal))
        whole = {self._number(one.coder) for one in columns if not _is_local(one.coder)}
        dictionaries = [one.coder for one in columns if isinstance(one.coder, Dictionary)]
        squashed = any(isinstance(one.activation, TanhReLU) for one in dictionaries)
        used, at = self.used(slots), _index(slots, self._columns.device)
        cells = {name: self._columns[name][at, :used] for name in _READ}
        return _Live(used, at, cells, kinds, tuple(sorted(whole)), squashed)

    def _note_change(self) -> None:
        """After a request came or went: whom the features of each dictionary compete with."""
        self._live.clear()
        features: dict[int, set[int]] = {}
        for column in (one for found in self._cells.values() for one in found if not _is_local(one.coder)):
            features.setdefault(self._number(column.coder), set()).add(column.feature)
        self._rivals = {
            number: self._rivals[number] if number in self._rivals and not grouped else Rivals.of(coder, chosen)
            for number, chosen in features.items()
            if isinstance(coder := self._whole[number - 1], Dictionary)
            for grouped in [isinstance(coder.activation, GroupMax)]
        }

    def _write_cell(self, slot: int, index: int, column: Column) -> None:
        coder = column.coder
        start = column.block * self._width
        row = coder.W_dec[column.feature, start : start + self._width].float()
        row = row if column.write_gain is None else row * column.write_gain
        cell: dict[str, Tensor | float | int | bool] = column.affine._asdict()
        cell |= {"W_dec": row, "norm": row.norm(), "feature": column.feature}
        cell |= {"first": column.first, "last": column.last, "special": column.special}
        if isinstance(coder, Dictionary):
            cell |= _encoder_cell(coder, column.feature)
        elif isinstance(coder, MatchingPursuit):
            cell["restores"] = NORMALISATIONS.index(coder.normalisation)
        if not _is_local(coder):
            cell["whole"] = self._number(coder)
        for name, value in cell.items():
            self._columns[name][slot, index] = value

    def _number(self, coder: SparseCoder) -> int:
        """The number, from 1, of a coder of which more than one row is needed."""
        for number, known in enumerate(self._whole, start=1):
            if known is coder:
                return number
        self._whole.append(coder)
        return len(self._whole)


_READ = (
    *("W_enc", "total", "normalisation", "gain", "bias", "gate", "threshold", "squashed", "whole", "feature"),
    *("alpha", "beta", "lo", "hi", "W_dec", "norm", "restores", "first", "last", "special"),
)


def _index(slots: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """Neighbouring slots are a view of the table."""
    if slots == tuple(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, device=device)


def _frames(x: Tensor, kinds: frozenset[str]) -> Tensor | None:
    """[3, B, T, kinds] each token's shift, divisor and scale under every normalisation; None where none has any."""
    if not kinds - {"none"}:
        return None
    each = [frame(kind if kind in kinds else "none", x) for kind in NORMALISATIONS]
    return torch.stack([torch.cat(parts, dim=-1) for parts in zip(*each, strict=True)])


def _is_local(coder: SparseCoder) -> bool:
    return isinstance(coder, Dictionary) and coder.activation.local


def _encoder_cell(dictionary: Dictionary, feature: int) -> dict[str, Tensor | float | int | bool]:
    """How one feature is read from its own row."""
    row = dictionary.encoder_row(feature)
    kind = NORMALISATIONS.index(dictionary.normalisation)
    return {
        "W_enc": row.weight,
        "total": row.weight.sum(),
        "normalisation": kind,
        "restores": 0 if dictionary.is_transcoder else kind,
        "gain": row.scalars.gain[0],
        "bias": row.scalars.bias[0],
        "gate": row.scalars.gate[0],
        "threshold": row.scalars.threshold[0],
        "squashed": row.scalars.squashed,
    }


def _pick(by_kind: Tensor, kind: Tensor) -> Tensor:
    """by_kind [B, T, kinds], kind int64 [B, E] -> [B, T, E]."""
    return by_kind.gather(-1, kind[:, None].expand(-1, by_kind.shape[1], -1))


def _target(f: Tensor, cells: dict[str, Tensor]) -> Tensor:
    alpha, beta, lo, hi = (cells[name][:, None] for name in ("alpha", "beta", "lo", "hi"))
    return torch.minimum(torch.maximum(alpha * f + beta, lo), hi)


def _eligible(positions: Tensor, special: Tensor, cells: dict[str, Tensor]) -> Tensor:
    """bool [B, T, E], True where the edit's scope holds the token."""
    position = positions[..., None]
    inside = (position >= cells["first"][:, None]) & (position < cells["last"][:, None])
    return inside & (cells["special"][:, None] | ~special[..., None])
