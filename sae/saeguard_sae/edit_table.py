"""Every live request's edits at one site, as columns ``slot x edit``: written when it joins, read every step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from saeguard_sae import encoding
from saeguard_sae.coders import SparseCoder
from saeguard_sae.edits import IDENTITY, Affine
from saeguard_sae.encoding import Cells, Coders, Needs

# One column of an edit table, and the tensors behind all: [slots, capacity, ...], grown and cleared together.


@dataclass(frozen=True, slots=True, eq=False)
class EditColumn:
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
class EditCounts:
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


# Whose tokens a forward pass reads: requests' tokens lie flat, one after the other, and are edited in groups.


class RowSpan(NamedTuple):
    """One request's tokens ``[start, start + length)`` among those of the pass; ``slot`` is its row of the tables."""

    slot: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """B requests' tokens as cells [B, T]: those that read about equally many, padded to the longest of them.

    A padded cell repeats its request's last token at position -1, which is in no edit's scope.
    """

    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: Tensor | slice
    """Of each cell, its token: int64 [B, T]; a slice where T is 1 and they lie together."""
    positions: Tensor
    """int64 [B, T], the token's position in its request."""
    special: Tensor
    """bool [B, T], True for special tokens."""
    filled: Tensor | None
    """int64 [n], the numbers in B x T of the cells that are not padded; None where none is."""

    @classmethod
    def singles(cls, slots: tuple[int, ...], positions: Tensor, special: Tensor) -> Group:
        """The first tokens of a pass, one of each slot; positions and special flags are the whole pass'."""
        count = len(slots)
        return cls(slots, (1,) * count, slice(0, count), positions[:count, None], special[:count, None], None)

    def take(self, x: Tensor) -> Tensor:
        """x [N, ...] -> the cells' [B, T, ...]."""
        return x[self.tokens][:, None] if isinstance(self.tokens, slice) else x[self.tokens]

    def put(self, cells: Tensor, x: Tensor) -> None:
        """Writes cells [B, T, d] into their places in x [N, d]."""
        if isinstance(self.tokens, slice):
            x[self.tokens] = cells[:, 0]
        elif self.filled is None:
            x[self.tokens.flatten()] = cells.flatten(0, 1)
        else:
            x[self.tokens.flatten()[self.filled]] = cells.flatten(0, 1)[self.filled]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The N tokens of one forward pass."""

    groups: tuple[Group, ...] = ()

    @classmethod
    def of(cls, spans: Sequence[RowSpan], positions: Tensor, special: Tensor) -> Rows:
        """Groups the spans by the power of two that holds them, so that less than half of the cells are padded.

        Args:
            spans: each request at most once; they need not lie in order, nor cover every token.
            positions: int64 [N].
            special: bool [N].
        """
        by_size: dict[int, list[RowSpan]] = defaultdict(list)
        for span in spans:
            by_size[(span.length - 1).bit_length()].append(span)
        return cls(tuple(_group(found, positions, special) for found in by_size.values()))


def as_index(slots: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """These slots as an index of a table; neighbouring ones are a view of it."""
    if slots == tuple(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, device=device)


def _group(spans: list[RowSpan], positions: Tensor, special: Tensor) -> Group:
    slots, starts, lengths = zip(*spans, strict=True)
    if max(lengths) == 1:
        first = starts[0]
        lie_together = list(starts) == list(range(first, first + len(starts)))
        tokens = slice(first, first + len(starts)) if lie_together else _to([[one] for one in starts], positions)
        return Group(slots, lengths, tokens, _cells(positions, tokens), _cells(special, tokens), None)
    longest = max(lengths)
    at = torch.arange(longest)
    sizes = torch.tensor(lengths)[:, None]
    index = torch.tensor(starts)[:, None] + torch.minimum(at, sizes - 1)
    padded = at >= sizes
    filled = None if min(lengths) == longest else (~padded).flatten().nonzero().squeeze(1).to(positions.device)
    index, padded = index.to(positions.device), padded.to(positions.device)
    return Group(slots, lengths, index, positions[index].masked_fill(padded, -1), special[index], filled)


def _to(rows: list[list[int]], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


def _cells(flat: Tensor, tokens: Tensor | slice) -> Tensor:
    return flat[tokens][:, None] if isinstance(tokens, slice) else flat[tokens]


# Products of tokens with the rows of their features: rows that many requests share are held, and read, once.


_WORTH_SHARING = 2
"""Different rows, at most so many times those of one request: with more, whole products do more than they save."""


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Rows of E features for each of B requests; ``index`` is None where each request has rows of its own."""

    W_enc: Tensor
    """[B, E, d_read], or the U different rows [U, d_read]."""
    W_dec: Tensor
    """[B, E, d_write], or [U, d_write]."""
    index: Tensor | None = None
    """int64 [B, 1, E], which of the U rows."""

    @classmethod
    def of(cls, W_enc: Tensor, W_dec: Tensor, at: slice | Tensor, row: Tensor) -> Product:
        """The rows as they lie in a table.

        Args:
            W_enc: [slots, capacity, d_read], and so W_dec.
            at: the B slots.
            row: int64 [B, E] of their first E columns, equal where rows are.
        """
        used = row.shape[1]
        found, index = torch.unique(row, return_inverse=True)
        if len(found) > _WORTH_SHARING * used or len(row) == 1:
            return cls(W_enc[at, :used], W_dec[at, :used])
        first = torch.empty_like(found).scatter_(0, index.flatten(), torch.arange(row.numel(), device=row.device))
        slots = torch.arange(len(W_enc), device=row.device)[at][first // used]
        return cls(W_enc[slots, first % used], W_dec[slots, first % used], index[:, None])

    def read(self, x: Tensor) -> Tensor:
        """x [B, T, d_read] -> its products [B, T, E] with the rows of W_enc."""
        if self.index is None:
            return torch.bmm(x, self.W_enc.transpose(1, 2))
        return (x @ self.W_enc.T).gather(-1, self.index.expand(-1, x.shape[1], -1))

    def write(self, size: Tensor) -> Tensor:
        """size [B, T, E] -> the sum [B, T, d_write] of so much of each row of W_dec."""
        if self.index is None:
            return torch.bmm(size, self.W_dec)
        spread = size.new_zeros(*size.shape[:2], len(self.W_dec))
        return spread.scatter_add_(-1, self.index.expand_as(size), size) @ self.W_dec


# The columns of a table that read the same tensor: how features are read from it, and what their edits change.
#
# Per step there is only index arithmetic on whole tensors: no loop over rows or edits, no transfer to the host. The
# encoder and decoder rows of a slot's features are copied in once, so the cost does not depend on d_sae.


_TINY = 1e-30
_REMEMBERED = 32
"""Sets of slots whose columns are kept at hand: a decode step's, and those of the prompts being read."""

COUNTERS = ("eligible", "edited", "capped", "sum", "max", "relative")

Tally: TypeAlias = dict[str, Tensor]
"""The counters [columns] of one slot by name."""


class ColumnChange(NamedTuple):
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


class EditColumns:
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

    def write(self, slot: int, columns: Sequence[EditColumn]) -> None:
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

    def change(self, x: Tensor, group: Group, held: Tensor | None, *, is_limited: bool) -> ColumnChange:
        """x [B, T, d_read] in float32 -> what this bank's edits add to the tensor that is written.

        Args:
            held: bool [B, T, 1 + guards], after one that is always on.
            is_limited: whether any of these requests has a limit.
        """
        live = self._needs(group.slots)
        cells = live.cells
        framed = encoding.frames(x, live.needs.kinds)
        f = encoding.values(x, live.product.read(x), cells, framed, live.needs, self._coders)
        eligible = _eligible(group.positions, group.special, cells)
        applied = eligible
        if live.is_guarded:
            assert held is not None, "an edit waits for a guard that nobody decides"
            applied = eligible & held.gather(-1, cells["guard"][:, None].expand_as(f))
        change = torch.where(applied, _target(f, cells) - f, 0.0)
        size = change if framed is None else change * encoding.topk_features(framed[2], cells["restores"])
        made = applied & cells["made"][:, None]
        written = torch.where(made, size, 0.0)
        delta, free = written, None
        if is_limited and live.is_free:
            limited = cells["limited"][:, None]
            delta, free = torch.where(limited, written, 0.0), live.product.write(torch.where(limited, 0.0, written))
        norm = size.abs() * cells["norm"][:, None]
        return ColumnChange(f, eligible, norm, change != 0, made, live.product.write(delta), free)

    def count(self, slots: tuple[int, ...], change: ColumnChange, norm: Tensor, shrink: Tensor | None) -> None:
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

    def counts(self, slot: int) -> list[EditCounts]:
        """What each of the slot's columns did, in their order. Waits for the device."""
        used = self.used((slot,))
        cells = zip(*(self._columns[name][slot, :used].tolist() for name in COUNTERS), strict=True)
        return [
            EditCounts(eligible, edited, capped, total / max(eligible, 1), largest, relative / max(eligible, 1))
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

    def _make(self, columns: Sequence[EditColumn]) -> _Slot:
        store = ColumnStore(1, len(columns), self._d_read, self._width, self._columns.device)
        store.fill(0, self._own(columns))
        groups: dict[int, list[int]] = {}
        for index, column in enumerate(columns):
            groups.setdefault(self._writer(column), []).append(index)
        whole = []
        for number, found in groups.items():
            features, coder = [columns[index].feature for index in found], self._writers[number][0]
            store.write(0, torch.tensor(found, device=store.device), self._rows(number, features))
            if not encoding.is_local(coder):
                whole.append((self._coders.number(coder), tuple(features)))
        return _Slot(
            len(columns),
            {name: store[name][0] for name in COLUMNS},
            Needs.of((self._writers[number][0] for number in groups), self._coders),
            tuple(whole),
            is_guarded=any(one.guard is not None for one in columns),
            is_free=any(not one.is_limited for one in columns),
        )

    def _own(self, columns: Sequence[EditColumn]) -> Cells:
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
        cells = encoding.rows(coder, features, self._coders)
        chosen = cells["feature"]
        row = coder.W_dec[chosen, block * self._width : (block + 1) * self._width].float()
        row = row if gain is None else row * gain
        return cells | {"W_dec": row, "norm": row.norm(dim=1), "row": chosen + (number << 32)}

    def _writer(self, column: EditColumn) -> int:
        """The number of what the column has its rows from."""
        for number, (coder, block, gain) in enumerate(self._writers):
            if coder is column.coder and block == column.block and gain is column.write_gain:
                return number
        self._writers.append((column.coder, column.block, column.write_gain))
        return len(self._writers) - 1


_LIVE = (
    *(name for name in encoding.READ if name != "W_enc"),
    *("alpha", "beta", "lo", "hi", "norm", "first", "last", "special", "guard", "made", "limited", "row"),
)


def _key(column: EditColumn) -> tuple[object, ...]:
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


FOREVER: int = torch.iinfo(torch.int64).max
"""A ``last`` position that is never reached."""


class EditTable:
    """Edits at one site of width ``width`` for ``slots`` requests. While it is empty, ``apply`` returns x itself.

    All edits of a site are measured before any of them is made, and summed, whatever tensor they read.
    """

    def __init__(self, slots: int, width: int, device: torch.device | str = "cpu", capacity: int = 8) -> None:
        self._slots, self._width, self._device = slots, width, torch.device(device)
        self._capacity = capacity
        self._banks: dict[Hashable, EditColumns] = {}
        self._limit = torch.full((slots,), torch.inf, device=device)
        self._limited: set[int] = set()
        self._order: dict[int, list[Hashable]] = {}
        self._read: list[tuple[Group, dict[Hashable, Tensor]]] = []

    def holds(self, slot: int) -> bool:
        """Whether this slot has columns."""
        return slot in self._order

    def reads(self, source: Hashable, rows: Rows) -> bool:
        """Whether a column of these requests reads that source."""
        return source in self._banks and any(self._banks[source].used(group.slots) for group in rows.groups)

    def write(self, slot: int, columns: Sequence[EditColumn], max_relative_edit: float = float("inf")) -> None:
        """Gives a free slot its columns, in this order. ``max_relative_edit`` limits ``|edit| / |x|`` per token."""
        assert slot not in self._order, "the slot still holds another request's edits"
        if not columns:
            return
        for source in dict.fromkeys(column.source for column in columns):
            mine = [column for column in columns if column.source == source]
            self._bank(source, mine[0].coder.d_in).write(slot, mine)
        self._limit[slot] = max_relative_edit
        if max_relative_edit < torch.inf:
            self._limited.add(slot)
        self._order[slot] = [column.source for column in columns]

    def clear(self, slot: int) -> None:
        """Frees the slot; nothing of its request stays."""
        if self._order.pop(slot, None) is not None:
            for bank in self._banks.values():
                bank.clear(slot)
            self._limit[slot] = torch.inf
            self._limited.discard(slot)

    def apply(
        self,
        x: Tensor,
        rows: Rows,
        sources: Mapping[Any, Tensor] | None = None,
        held: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """x [N, width] -> the edited x in its dtype, or x itself; tokens on which nothing is edited are bit-identical.

        Args:
            rows: whose tokens they are.
            sources: the tensors [N, d_read] that columns with a ``source`` read.
            held: by group, which guards are on: ``Guards.held``; None where no column has a guard.
        """
        self._read.clear()
        out = x
        for number, group in enumerate(rows.groups):
            live = {source: bank for source, bank in self._banks.items() if bank.used(group.slots)}
            if live:
                out = x.clone() if out is x else out
                group.put(self._edit(x, group, live, sources or {}, held[number] if held else None), out)
        return out

    def counts(self, slot: int) -> list[EditCounts]:
        """What each of the slot's columns did, in their order. Waits for the device."""
        found = {source: iter(bank.counts(slot)) for source, bank in self._banks.items()}
        return [next(found[source]) for source in self._order.get(slot, ())]

    def tally(self, slot: int) -> dict[Hashable, Tally]:
        """What the slot's columns counted so far, to ``resume`` from in a slot with the same columns."""
        return {source: bank.tally(slot) for source, bank in self._banks.items() if bank.used((slot,))}

    def resume(self, slot: int, tally: Mapping[Hashable, Tally]) -> None:
        """Goes on counting from there."""
        for source, counted in tally.items():
            self._banks[source].resume(slot, counted)

    def values(self, slot: int, index: int) -> Tensor:
        """[T] what a slot's column read of its T tokens in the last pass."""
        order = self._order[slot]
        for group, read in self._read:
            if slot in group.slots:
                row = group.slots.index(slot)
                found = read[order[index]][row, : group.lengths[row]]
                return found[:, order[:index].count(order[index])]
        raise AssertionError("the column had nothing to do")

    def _edit(
        self,
        x: Tensor,
        group: Group,
        live: Mapping[Hashable, EditColumns],
        sources: Mapping[Any, Tensor],
        held: Tensor | None,
    ) -> Tensor:
        """[B, T, width] a group's tokens with their edits."""
        own = group.take(x)
        wide = own.float()
        read: dict[Hashable, Tensor] = {key: wide if key is None else group.take(sources[key]).float() for key in live}
        is_limited = any(slot in self._limited for slot in group.slots)
        changes = {key: bank.change(read[key], group, held, is_limited=is_limited) for key, bank in live.items()}
        self._read.append((group, {key: one.f for key, one in changes.items()}))
        delta, norm = reduce(torch.add, (one.delta for one in changes.values())), wide.norm(dim=-1)
        shrink = None
        if is_limited:
            allowed, length = self._limit[next(iter(live.values())).at(group.slots), None] * norm, delta.norm(dim=-1)
            shrink = torch.where(length > allowed, allowed / length, 1.0)
            free = (one.free for one in changes.values() if one.free is not None)
            delta = reduce(torch.add, free, delta * shrink[..., None])
        for key, change in changes.items():
            live[key].count(group.slots, change, norm, shrink)
        made = torch.cat([one.made for one in changes.values()], dim=-1)
        return torch.where(made.any(dim=-1, keepdim=True), (wide + delta).to(x.dtype), own)

    def _bank(self, source: Hashable, d_read: int) -> EditColumns:
        if source not in self._banks:
            self._banks[source] = EditColumns(self._slots, d_read, self._width, self._device, self._capacity)
        return self._banks[source]
