"""Conditions on features, decided token by token while the model reads: state per request, arithmetic for all at once.

``rule``: what a guard is; ``probes``: the sums they look at; ``state``: what they remember; ``deciding``: from sums to
on or off; ``table``: all of it for the requests of an engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from saeguard_sae import encoding
from saeguard_sae.coders import SparseCoder
from saeguard_sae.edit_table import ColumnStore, Group, Kind, Rows, as_index
from saeguard_sae.edits import FLOAT32_MAX
from saeguard_sae.encoding import Cells, Coders, Needs

# From the values of sums on consecutive tokens, and what was kept of earlier ones, to on or off on each of them.
#
# Cells are [B, T, G]: requests, tokens, guards. Nothing here depends on how a text is cut into parts: what a part
# leaves behind is exactly what the next one needs. Most passes read one token of each request, and need no scan.


class Scan(NamedTuple):
    """bool [B, T, G] each."""

    on: Tensor
    """After each token."""
    fired: Tensor
    """Whether it came on at or before each token."""


def over_tokens(cells: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, T, G] -> [B, G] by what takes the largest, smallest or sum along dimension 1."""
    return cells[:, 0] if cells.shape[1] == 1 else how(cells)


def running_maximum(value: Tensor, inside: Tensor, before: Tensor) -> Tensor:
    """[B, T, G] the largest value in scope so far; ``before`` [B, G] of earlier tokens."""
    masked = torch.where(inside, value, -torch.inf)
    so_far = masked if value.shape[1] == 1 else masked.cummax(dim=1).values
    return torch.maximum(so_far, before[:, None])


def window_sums(value: Tensor, inside: Tensor, ring: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the last values in scope at each token, and the ring that goes on from there.

    Each window is added up on its own, so that no error runs along.

    Args:
        value: float64 [B, T, G].
        inside: bool [B, T, G], tokens out of scope are skipped.
        ring: [B, G, R] the last values of earlier tokens, the latest last, zeros while there are fewer.
        tokens: int64 [B, G], how many values a window holds, at most R + 1.
    """
    length, back = value.shape[1], ring.shape[2]
    recent = torch.arange(back, -1, -1, device=value.device) < tokens[..., None]
    if length == 1:
        line = torch.cat([ring, value.transpose(1, 2)], dim=-1)
        return (line * recent).sum(dim=-1)[:, None], torch.where(inside.transpose(1, 2), line[..., 1:], ring)
    rank = inside.cumsum(dim=1).transpose(1, 2)
    # Values in scope lie one after the other behind the ring; the others are written where nobody looks.
    place = torch.where(inside.transpose(1, 2), back - 1 + rank, back + length)
    line = functional.pad(ring, (0, length + 1)).scatter_(2, place, value.transpose(1, 2))
    windows = line[..., :-1].unfold(2, back + 1, 1)
    sums = (windows * recent[:, :, None]).sum(dim=-1)
    kept = rank[..., -1:] + torch.arange(back, device=value.device)
    return sums.gather(2, (rank - 1).clamp_min(0)).transpose(1, 2), line.gather(2, kept)


def hold(comes: Tensor, stays: Tensor, inside: Tensor, on: Tensor, fired: Tensor) -> Scan:
    """Hysteresis: on where it ``comes``, as long as it ``stays``; tokens out of scope leave it as it is.

    Whether it is on is whether the last token on which it came is later than the last on which it did not stay.

    Args:
        on: bool [B, G] before the first token.
        fired: bool [B, G] whether it was ever on before.
    """
    if comes.shape[1] == 1:
        came = inside & comes
        return Scan(came | (on[:, None] & ~(inside & ~stays)), fired[:, None] | came)
    at = torch.arange(2, comes.shape[1] + 2, device=comes.device)[:, None]
    came = torch.where(inside & comes, at, on[:, None].long()).cummax(dim=1).values
    left = torch.where(inside & ~stays, at, (~on)[:, None].long()).cummax(dim=1).values
    return Scan(came > left, fired[:, None] | (came > 1))


# What one guard is: the sum it looks at, how it decides, on which tokens; and what it has seen.


Comparison: TypeAlias = Literal["above", "at_least", "below", "at_most"]
WindowKind: TypeAlias = Literal["this_token", "any_so_far", "maximum", "rolling_mean", "k_of_n"]

NEVER: int = torch.iinfo(torch.int64).max
"""The first position of a guard that has not been on."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightedFeature:
    """Weighted features of one coder, read at one place of the model."""

    place: Hashable
    """Where it is read, and the guard decided if it is the last: what ``Guards.see`` is told."""
    source: Hashable
    """Which tensor it reads there; None for the one that is edited at the place."""
    coder: SparseCoder
    features: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompiledCondition:
    """``bias + sum`` over a window, compared with a threshold, on tokens at positions ``[first, last)``.

    On from the token on which it compares true until one on which it no longer does with ``release``. Tokens out of
    scope leave it as it is. ``window``: the present value, its running maximum, the mean of the last ``tokens`` values
    (of fewer while there are fewer), or whether ``k`` of them compared true; ``any_so_far`` stays on.
    """

    summands: tuple[WeightedFeature, ...]
    """In the order in which a forward pass reaches their places."""
    bias: float = 0.0
    comparison: Comparison = "above"
    threshold: float = 0.0
    release: float = 0.0
    window: WindowKind = "this_token"
    tokens: int = 1
    k: int = 1
    first: int = 0
    last: int = NEVER
    special: bool = False
    """Also on special tokens."""
    latches: bool = False
    """For edits it stays on once it was on."""
    stops: bool = False
    """``Guards.stopped`` tells when it was on."""

    @property
    def looks_back(self) -> int:
        """Earlier values that it needs."""
        return self.tokens - 1 if self.is_windowed else 0

    @property
    def is_windowed(self) -> bool:
        """Whether it looks at more than one value."""
        return self.window in ("rolling_mean", "k_of_n")


@dataclass(frozen=True, slots=True)
class ConditionCounts:
    """What one guard saw so far, on the tokens in its scope."""

    evaluated: int
    on: int
    first: int | None
    """Position of the first token on which it was on."""
    maximum: float
    """Largest value of its sum; -inf where nothing was evaluated."""


# Sums of features of one tensor, for the guards of many requests: what they have in common is computed once.
#
# Each different feature is read once for all tokens of a pass, each different sum is added up once, and every guard
# is given its own: a policy's guards cost the same whether one request has them or all.


Sum: TypeAlias = tuple[WeightedFeature, ...]
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
        framed = encoding.frames(x, compiled.needs.kinds)
        f = encoding.values(x, x @ cells["W_enc"][0].T, cells, framed, compiled.needs, self._coders)
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
            store.write(0, self._on_device(at), encoding.rows(coder, mine, self._coders))
            if not encoding.is_local(coder):
                whole.append((self._coders.number(coder), mine))
        self._coders.note(whole)
        return {name: store[name] for name in encoding.READ}

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


# What guards are and what they remember, as tensors [slots, capacity], grown and cleared together.


COLUMNS: dict[str, Kind] = {
    # How it decides. Both sides of a comparison are multiplied by sign, and what must be exceeded is the next larger
    # number, so that all of them ask whether a value is at least that.
    "bias": Kind(0.0, torch.float64),
    "sign": Kind(1.0, torch.float64),
    "threshold": Kind(0.0, torch.float64),
    "release": Kind(0.0, torch.float64),
    "is_maximum": Kind(False, torch.bool),
    "is_count": Kind(False, torch.bool),
    "tokens": Kind(1, torch.int64),
    "k": Kind(1, torch.int64),
    # Where: the number of the place at which it is decided, positions, special tokens.
    "place": Kind(-1, torch.int64),
    "first": Kind(0, torch.int64),
    "last": Kind(0, torch.int64),
    "special": Kind(False, torch.bool),
    # What follows.
    "latches": Kind(False, torch.bool),
    "stops": Kind(False, torch.bool),
    # What it remembers: whether it is on, tokens evaluated and on, where it first was, the largest value.
    "on": Kind(False, torch.bool),
    "evaluated": Kind(0, torch.int64),
    "count": Kind(0, torch.int64),
    "position": Kind(NEVER, torch.int64),
    "maximum": Kind(-torch.inf, torch.float64),
}
KEPT = ("on", "evaluated", "count", "position", "maximum")


class ConditionState:
    """Room for the guards of ``slots`` requests, idle at first. ``ring`` [slots, capacity, longest] is as long as the
    longest window in use needs: the last values in scope, the latest last."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.device, self._slots, self._capacity = device, slots, 4
        self._tensors = self._make(4)
        self.ring = torch.zeros(slots, 4, 0, dtype=torch.float64, device=device)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def write(self, slot: int, cells: Mapping[str, Tensor]) -> None:
        """Gives a free slot its n guards, as ``cells`` makes them."""
        count = len(cells["place"])
        if count > self._capacity:
            self._grow(count)
        for name, values in cells.items():
            self._tensors[name][slot, :count] = values

    def clear(self, slot: int) -> None:
        """Makes a slot's cells idle."""
        for name, kind in COLUMNS.items():
            self._tensors[name][slot] = kind.idle
        self.ring[slot] = 0.0

    def fit(self, longest: int) -> None:
        """Lets the ring hold ``longest`` values, the latest of those it holds."""
        have = self.ring.shape[2]
        if longest != have:
            kept = min(longest, have)
            ring = self.ring.new_zeros(*self.ring.shape[:2], longest)
            ring[..., longest - kept :] = self.ring[..., have - kept :]
            self.ring = ring

    def tally(self, slot: int, used: int, longest: int) -> dict[str, Tensor]:
        """What the slot's ``used`` guards remember."""
        found = {name: self._tensors[name][slot, :used].clone() for name in KEPT}
        return found | {"ring": self.ring[slot, :used, self.ring.shape[2] - longest :].clone()}

    def resume(self, slot: int, tally: Mapping[str, Tensor]) -> None:
        """Goes on from there."""
        for name in KEPT:
            self._tensors[name][slot, : len(tally[name])] = tally[name]
        ring = tally["ring"]
        self.ring[slot, : len(ring), self.ring.shape[2] - ring.shape[1] :] = ring

    def _grow(self, needed: int) -> None:
        old, ring = self._tensors, self.ring
        while self._capacity < needed:
            self._capacity *= 2
        self._tensors = self._make(self._capacity)
        for name, tensor in old.items():
            self._tensors[name][:, : tensor.shape[1]] = tensor
        self.ring = ring.new_zeros(self._slots, self._capacity, ring.shape[2])
        self.ring[:, : ring.shape[1]] = ring

    def _make(self, capacity: int) -> dict[str, Tensor]:
        shape = (self._slots, capacity)
        return {
            name: torch.full(shape, kind.idle, dtype=kind.dtype, device=self.device) for name, kind in COLUMNS.items()
        }


def columns_of(guards: Sequence[CompiledCondition], places: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """What n guards are, decided at the places with these numbers: [n] by column."""
    lists = _lists(guards, places)
    return {name: torch.tensor(values, dtype=COLUMNS[name].dtype, device=device) for name, values in lists.items()}


def _lists(
    guards: Sequence[CompiledCondition], places: Sequence[int]
) -> dict[str, list[float] | list[int] | list[bool]]:
    signs = [1.0 if one.comparison in ("above", "at_least") else -1.0 for one in guards]
    pairs = list(zip(signs, guards, strict=True))
    return {
        "bias": [one.bias for one in guards],
        "sign": signs,
        "threshold": [_least(one, sign * one.threshold) for sign, one in pairs],
        # What has come once never leaves: no value compares false with minus infinity.
        "release": [
            -math.inf if one.window == "any_so_far" else _least(one, sign * one.release) for sign, one in pairs
        ],
        "is_maximum": [one.window == "maximum" for one in guards],
        "is_count": [one.window == "k_of_n" for one in guards],
        # A mean of one value is that value: what looks at no window needs no case of its own.
        "tokens": [one.looks_back + 1 for one in guards],
        "k": [one.k for one in guards],
        "place": list(places),
        "first": [one.first for one in guards],
        "last": [one.last for one in guards],
        "special": [one.special for one in guards],
        "latches": [one.latches for one in guards],
        "stops": [one.stops for one in guards],
    }


def _least(one: CompiledCondition, threshold: float) -> float:
    """The smallest number that compares true."""
    return math.nextafter(threshold, math.inf) if one.comparison in ("above", "below") else threshold


# The guards of ``slots`` requests: written when a request joins, decided in every pass as it reaches their places.
#
# Per step there is only arithmetic on whole tensors: no loop over requests or guards, no transfer to the host.


_REMEMBERED = 32
"""Sets of slots whose guards are kept at hand."""

ConditionMemory: TypeAlias = dict[str, Tensor]
"""What the guards of one slot keep, by name."""


@dataclass(frozen=True, slots=True)
class _Slot:
    numbers: tuple[int, ...]
    """The column of each guard, in the order in which they were given."""
    cells: dict[str, Tensor]
    """What the guards are, [n] by column."""
    sums: dict[tuple[Hashable, Hashable], list[Sum]]
    """By place and source, what each guard reads there."""
    windowed: int
    """So many of the first columns look back over several values."""
    looks_back: int
    has_maximum: bool
    stops: bool
    places: frozenset[int]
    """Where any of them is decided."""


class _Live(NamedTuple):
    """The guards of some slots; found once for each change of who is here."""

    at: slice | Tensor
    used: int
    windowed: int
    cells: dict[str, Tensor]
    has_maximum: bool
    places: frozenset[int]


@dataclass(slots=True, eq=False)
class _Pass:
    """A group's sums so far in this pass, and its guards' states on each token."""

    sums: Tensor
    """float64 [B, T, G]"""
    held: Tensor
    """bool [B, T, 1 + G], after one that is always on."""


class ConditionTable:
    """Decides the guards of up to ``slots`` requests."""

    def __init__(self, slots: int, device: torch.device | str = "cpu") -> None:
        self._count, self._device = slots, torch.device(device)
        self._store = ConditionState(slots, self._device)
        self._slots: dict[int, _Slot] = {}
        self._made: dict[tuple[CompiledCondition, ...], _Slot] = {}
        """A policy's guards come with every request: they are made once."""
        self._places: dict[Hashable, int] = {}
        self._probes: dict[Hashable, dict[Hashable, Probes]] = {}
        self._live: dict[tuple[int, ...], _Live] = {}
        self._now: list[_Pass | None] = []

    def holds(self, slots: Sequence[int]) -> bool:
        """Whether any of these slots has guards."""
        return bool(self._slots) and any(slot in self._slots for slot in slots)

    def reads(self, place: Hashable, source: Hashable, rows: Rows) -> bool:
        """Whether a guard of these requests reads that tensor at that place."""
        found = self._probes.get(place, {}).get(source)
        return found is not None and any(found.holds(group.slots) for group in rows.groups)

    def reads_at(self, place: Hashable, slot: int) -> bool:
        """Whether a guard of the slot reads something at that place."""
        return any(one.holds((slot,)) for one in self._probes.get(place, {}).values())

    def can_stop(self, slots: Sequence[int]) -> bool:
        """Whether any of these slots has a guard that stops."""
        return bool(self._slots) and any(self._slots[slot].stops for slot in slots if slot in self._slots)

    def write(self, slot: int, guards: Sequence[CompiledCondition]) -> list[int]:
        """Gives a free slot its guards -> the number by which an edit's column waits for each."""
        assert slot not in self._slots, "the slot still holds another request's guards"
        if not guards:
            return []
        key = tuple(guards)
        if key not in self._made:
            if len(self._made) >= _REMEMBERED:
                self._made.clear()
            self._made[key] = self._make(guards)
        mine = self._slots[slot] = self._made[key]
        self._store.write(slot, mine.cells)
        for (place, source), sums in mine.sums.items():
            self._probes[place][source].write(slot, sums)
        self._note_change()
        return list(mine.numbers)

    def clear(self, slot: int) -> None:
        """Frees the slot; nothing of its request stays."""
        if self._slots.pop(slot, None) is not None:
            self._store.clear(slot)
            for probes in (one for sources in self._probes.values() for one in sources.values()):
                probes.clear(slot)
            self._note_change()

    def begin(self, rows: Rows) -> None:
        """Before a forward pass that reads these tokens."""
        self._now = [self._open(group) if self.holds(group.slots) else None for group in rows.groups]

    def see(self, place: Hashable, x: Tensor, rows: Rows, sources: Mapping[Any, Tensor]) -> None:
        """At a place of the pass: reads x [N, d] there, or ``sources``, and decides what is decided there."""
        probes, number = self._probes.get(place), self._places.get(place)
        if probes is None:
            return
        for group, now in zip(rows.groups, self._now, strict=True):
            if now is None:
                continue
            live = self._needs(group.slots)
            for source, one in probes.items():
                if one.holds(group.slots):
                    tensor = x if source is None else sources[source]
                    read = one.read(group.take(tensor).float(), live.at, live.used)
                    now.sums[..., : read.shape[-1]] += read
            if number in live.places:
                self._decide(now, group, live, number)

    @property
    def held(self) -> list[Tensor | None]:
        """By group of the pass: bool [B, T, 1 + guards], which are on for edits, after one that always is."""
        return [None if now is None else now.held for now in self._now]

    def stopped(self, slots: tuple[int, ...]) -> Tensor:
        """bool [B], whether a guard that stops has been on."""
        live = self._needs(slots)
        fired = self._store["position"][live.at, : live.used] < NEVER
        return (fired & live.cells["stops"]).any(dim=-1)

    def seen(self, slot: int) -> list[ConditionCounts]:
        """What the slot's guards saw, in their order. Waits for the device."""
        if slot not in self._slots:
            return []
        names, used = ("evaluated", "count", "position", "maximum"), len(self._slots[slot].numbers)
        cells = list(zip(*(self._store[name][slot, :used].tolist() for name in names), strict=True))
        found = [
            ConditionCounts(evaluated, on, None if first == NEVER else first, most)
            for evaluated, on, first, most in cells
        ]
        return [found[column] for column in self._slots[slot].numbers]

    def tally(self, slot: int) -> ConditionMemory:
        """What the slot's guards remember, to ``resume`` from in a slot with the same ones; stays on the device."""
        if slot not in self._slots:
            return {}
        mine = self._slots[slot]
        return self._store.tally(slot, len(mine.numbers), mine.looks_back)

    def resume(self, slot: int, memory: ConditionMemory) -> None:
        """Goes on from there."""
        if memory:
            self._store.resume(slot, memory)

    def _decide(self, now: _Pass, group: Group, live: _Live, place: int) -> None:
        cells, store = live.cells, self._store
        here = cells["place"] == place
        inside = _inside(group, cells) & here[:, None]
        value = now.sums
        comes, stays = self._compared(value, inside, live)
        before = {
            name: store[name][live.at, : live.used] for name in ("on", "evaluated", "count", "position", "maximum")
        }
        scan = hold(comes, stays, inside, before["on"], before["position"] < NEVER)
        on_inside = scan.on & inside
        position = torch.where(on_inside, group.positions[..., None], NEVER)
        largest = torch.where(inside, value, -torch.inf)
        after = {
            "on": scan.on[:, -1],
            "evaluated": before["evaluated"] + over_tokens(inside, lambda cells: cells.sum(dim=1)),
            "count": before["count"] + over_tokens(on_inside, lambda cells: cells.sum(dim=1)),
            "position": torch.minimum(before["position"], over_tokens(position, lambda cells: cells.amin(dim=1))),
            "maximum": torch.maximum(before["maximum"], over_tokens(largest, lambda cells: cells.amax(dim=1))),
        }
        for name, kept in after.items():
            store[name][live.at, : live.used] = kept
        held = torch.where(cells["latches"][:, None], scan.fired, scan.on)
        now.held[..., 1:] = torch.where(here[:, None], held, now.held[..., 1:])

    def _compared(self, value: Tensor, inside: Tensor, live: _Live) -> tuple[Tensor, Tensor]:
        """bool [B, T, G], whether the value over its window compares true with the threshold, and with the release."""
        cells = {name: cell[:, None] for name, cell in live.cells.items()}
        store, windowed = self._store, live.windowed
        looked = value
        if live.has_maximum:
            largest = running_maximum(value, inside, store["maximum"][live.at, : live.used])
            looked = torch.where(cells["is_maximum"], largest, looked)
        u = cells["sign"] * looked
        comes, stays = u >= cells["threshold"], u >= cells["release"]
        if not windowed:
            return comes, stays
        first = {name: cell[..., :windowed] for name, cell in cells.items()}
        scope, is_count = inside[..., :windowed], first["is_count"]
        own = torch.where(is_count, comes[..., :windowed].double(), value[..., :windowed])
        sums, ring = window_sums(own, scope, store.ring[live.at, :windowed], first["tokens"][:, 0])
        store.ring[live.at, :windowed] = ring
        read = store["evaluated"][live.at, None, :windowed] + (scope if scope.shape[1] == 1 else scope.cumsum(dim=1))
        mean = first["sign"] * sums / torch.minimum(read, first["tokens"]).clamp_min(1)
        if live.has_maximum:
            mean = torch.where(first["is_maximum"], u[..., :windowed], mean)
        enough = sums >= first["k"]
        comes[..., :windowed] = torch.where(is_count, enough, mean >= first["threshold"])
        stays[..., :windowed] = torch.where(is_count, enough, mean >= first["release"])
        return comes, stays

    def _open(self, group: Group) -> _Pass:
        live, length = self._needs(group.slots), group.positions.shape[1]
        shape = (len(group.slots), length, live.used)
        sums = live.cells["bias"][:, None].expand(shape).clone()
        return _Pass(sums, torch.ones(*shape[:2], live.used + 1, dtype=torch.bool, device=self._device))

    def _needs(self, slots: tuple[int, ...]) -> _Live:
        if slots not in self._live:
            if len(self._live) >= _REMEMBERED:
                self._live.clear()
            self._live[slots] = self._look_up(slots)
        return self._live[slots]

    def _look_up(self, slots: tuple[int, ...]) -> _Live:
        here = [self._slots[slot] for slot in slots if slot in self._slots]
        at, used = as_index(slots, self._device), max((len(one.numbers) for one in here), default=0)
        return _Live(
            at,
            used,
            max((one.windowed for one in here), default=0),
            {name: self._store[name][at, :used] for name in COLUMNS if name not in KEPT},
            any(one.has_maximum for one in here),
            frozenset().union(*(one.places for one in here)),
        )

    def _note_change(self) -> None:
        self._store.fit(max((one.looks_back for one in self._slots.values()), default=0))
        self._live.clear()

    def _make(self, guards: Sequence[CompiledCondition]) -> _Slot:
        order = sorted(range(len(guards)), key=lambda at: not guards[at].is_windowed)
        ordered = [guards[at] for at in order]
        places = [self._places.setdefault(one.summands[-1].place, len(self._places)) for one in ordered]
        return _Slot(
            tuple(sorted(range(len(guards)), key=lambda column: order[column])),
            columns_of(ordered, places, self._device),
            self._sums(ordered),
            sum(one.is_windowed for one in ordered),
            max(one.looks_back for one in ordered),
            any(one.window == "maximum" for one in ordered),
            any(one.stops for one in ordered),
            frozenset(places),
        )

    def _sums(self, guards: Sequence[CompiledCondition]) -> dict[tuple[Hashable, Hashable], list[Sum]]:
        """What the guards read, place by place and tensor by tensor."""
        read = {(part.place, part.source): part.coder.d_in for one in guards for part in one.summands}
        for (place, source), width in read.items():
            at_place = self._probes.setdefault(place, {})
            if source not in at_place:
                at_place[source] = Probes(self._count, width, self._device)
        return {
            where: [tuple(part for part in one.summands if (part.place, part.source) == where) for one in guards]
            for where in read
        }


def _inside(group: Group, cells: Mapping[str, Tensor]) -> Tensor:
    """bool [B, T, G], True where a guard's scope holds the token."""
    position = group.positions[..., None]
    scope = (position >= cells["first"][:, None]) & (position < cells["last"][:, None])
    return scope & (cells["special"][:, None] | ~group.special[..., None])
