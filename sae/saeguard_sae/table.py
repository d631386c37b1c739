"""Every live request's edits at one site, as columns: ``slot x edit``. Written when a request joins, read every step.

Per step there is only index arithmetic on whole tensors: no loop over rows or edits, no transfer to the host. The
encoder and decoder rows of a slot's features are copied in once, so the cost does not depend on d_sae. TopK is the
exception: it needs every pre-activation, so a TopK dictionary is encoded while one of its features is live.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard_sae.columns import ColumnStore
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.edits import IDENTITY, Affine

FOREVER: int = torch.iinfo(torch.int64).max
"""A ``last`` position that is never reached."""
_TINY = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One edit of one feature for one slot, on tokens at positions ``[first, last)``; by default it only reads.

    ``special`` also edits special tokens.
    """

    dictionary: Dictionary
    feature: int
    affine: Affine = IDENTITY
    first: int = 0
    last: int = 0
    special: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """What one column did so far, over the tokens in its scope."""

    eligible: int
    edited: int
    capped: int
    mean_activation: float
    max_activation: float
    mean_relative_edit: float


class EditTable:
    """Edits at one site of width ``width`` for ``slots`` requests. While it is empty, ``apply`` returns x itself."""

    def __init__(self, slots: int, width: int, device: torch.device | str = "cpu", capacity: int = 8) -> None:
        self._columns = ColumnStore(slots, capacity, width, torch.device(device))
        self._limit = torch.full((slots,), torch.inf, device=device)
        self._used: dict[int, int] = {}
        self._whole: list[Dictionary] = []
        self._whole_of: dict[int, frozenset[int]] = {}
        self.values: Tensor | None = None
        """Feature values [B, T, columns] before the edits, of the last ``apply``; None when it had nothing to do."""

    def used(self, slots: slice) -> int:
        """Columns that the fullest of these slots has."""
        return max((count for slot, count in self._used.items() if slots.start <= slot < slots.stop), default=0)

    def write(self, slot: int, columns: Sequence[Column], max_relative_edit: float = float("inf")) -> None:
        """Gives a free slot its columns, in this order. ``max_relative_edit`` limits ``|edit| / |x|`` per token."""
        assert slot not in self._used, "the slot still holds another request's edits"
        if not columns:
            return
        if len(columns) > self._columns.capacity:
            self._columns.grow(len(columns))
        whole = {self._number(one.dictionary) for one in columns if not one.dictionary.activation.local}
        for index, column in enumerate(columns):
            self._write_cell(slot, index, column)
        self._limit[slot] = max_relative_edit
        self._used[slot], self._whole_of[slot] = len(columns), frozenset(whole)

    def clear(self, slot: int) -> None:
        """Frees the slot; nothing of its request stays."""
        if slot in self._used:
            del self._used[slot], self._whole_of[slot]
            self._columns.clear(slot)
            self._limit[slot] = torch.inf

    def move(self, source: int, target: int) -> None:
        """Moves a slot's columns and counts to a free slot."""
        assert target not in self._used, "the target slot still holds another request's edits"
        if source in self._used:
            self._columns.move(source, target)
            self._limit[target] = self._limit[source]
            self._used[target] = self._used.pop(source)
            self._whole_of[target] = self._whole_of.pop(source)

    def apply(self, x: Tensor, slots: slice, positions: Tensor, special: Tensor) -> Tensor:
        """x [B, T, width] of B consecutive slots -> the edited x in its dtype; tokens out of scope come back
        bit-identical.

        Args:
            slots: the slot of each row of x.
            positions: int64 [B, T], the token's position in its request.
            special: bool [B, T], True for special tokens.
        """
        used = self.used(slots)
        self.values = None
        if not used:
            return x
        cells = {name: self._columns[name][slots, :used] for name in _READ}
        wide = x.float()
        f = self._read(wide, cells, slots)
        self.values = f
        eligible = _eligible(positions, special, cells)
        change = torch.where(eligible, _target(f, cells) - f, 0.0)
        delta = torch.bmm(change, cells["W_dec"])
        size = wide.norm(dim=-1)
        allowed = self._limit[slots, None] * size
        length = delta.norm(dim=-1)
        capped = length > allowed
        shrink = torch.where(capped, allowed / length, 1.0)
        relative = change.abs() * cells["norm"][:, None] * (shrink / size.clamp_min(_TINY))[..., None]
        self._count(slots, used, eligible, change, f, relative, capped)
        edited = (wide + delta * shrink[..., None]).to(x.dtype)
        return torch.where(eligible.any(dim=-1, keepdim=True), edited, x)

    def counts(self, slot: int) -> list[Counts]:
        """What each of the slot's columns did, in their order. Waits for the device."""
        used = self._used.get(slot, 0)
        names = ("eligible", "edited", "capped", "sum", "max", "relative")
        cells = zip(*(self._columns[name][slot, :used].tolist() for name in names), strict=True)
        return [
            Counts(eligible, edited, capped, total / max(eligible, 1), largest, relative / max(eligible, 1))
            for eligible, edited, capped, total, largest, relative in cells
        ]

    def _read(self, x: Tensor, cells: dict[str, Tensor], slots: slice) -> Tensor:
        """[B, T, E] the value of each slot's features."""
        q = torch.bmm(x, cells["W_enc"].transpose(1, 2))
        is_on = q + cells["gate"][:, None] > cells["threshold"][:, None]
        f = (q * cells["gain"][:, None] + cells["bias"][:, None]).relu() * is_on
        live = {
            number for slot, numbers in self._whole_of.items() if slots.start <= slot < slots.stop for number in numbers
        }
        for number in sorted(live):
            every = self._whole[number - 1].encode(x).float()
            mine = (cells["whole"] == number)[:, None]
            index = torch.where(mine, cells["feature"][:, None], 0).expand_as(f)
            f = torch.where(mine, every.gather(-1, index), f)
        return f

    def _count(
        self, slots: slice, used: int, eligible: Tensor, change: Tensor, f: Tensor, relative: Tensor, capped: Tensor
    ) -> None:
        inside = torch.where(eligible, f, 0.0)
        for name, amount in (
            ("eligible", eligible),
            ("edited", change != 0),
            ("capped", eligible & capped[..., None]),
            ("sum", inside),
            ("relative", relative),
        ):
            cell = self._columns[name][slots, :used]
            cell += amount.sum(dim=1, dtype=cell.dtype)
        largest = self._columns["max"][slots, :used]
        torch.maximum(largest, inside.amax(dim=1), out=largest)

    def _write_cell(self, slot: int, index: int, column: Column) -> None:
        d, j = column.dictionary, column.feature
        row = d.W_dec[j]
        cell: dict[str, Tensor | float | int | bool] = column.affine._asdict()
        cell |= {"W_dec": row, "norm": row.norm(), "feature": j}
        cell |= {"first": column.first, "last": column.last, "special": column.special}
        if d.activation.local:
            one = d.only(j)
            scalars = one.activation.columns(one.centred_bias())
            cell |= {"W_enc": one.W_enc[:, 0], "gain": scalars.gain[0], "bias": scalars.bias[0]}
            cell |= {"gate": scalars.gate[0], "threshold": scalars.threshold[0]}
        else:
            cell["whole"] = self._number(d)
        for name, value in cell.items():
            self._columns[name][slot, index] = value

    def _number(self, dictionary: Dictionary) -> int:
        """The number, from 1, of a dictionary that is encoded whole."""
        for number, known in enumerate(self._whole, start=1):
            if known is dictionary:
                return number
        self._whole.append(dictionary)
        return len(self._whole)


_READ = (
    *("W_enc", "gain", "bias", "gate", "threshold", "whole", "feature"),
    *("alpha", "beta", "lo", "hi", "W_dec", "norm", "first", "last", "special"),
)


def _target(f: Tensor, cells: dict[str, Tensor]) -> Tensor:
    alpha, beta, lo, hi = (cells[name][:, None] for name in ("alpha", "beta", "lo", "hi"))
    return torch.minimum(torch.maximum(alpha * f + beta, lo), hi)


def _eligible(positions: Tensor, special: Tensor, cells: dict[str, Tensor]) -> Tensor:
    """bool [B, T, E], True where the edit's scope holds the token."""
    position = positions[..., None]
    inside = (position >= cells["first"][:, None]) & (position < cells["last"][:, None])
    return inside & (cells["special"][:, None] | ~special[..., None])
