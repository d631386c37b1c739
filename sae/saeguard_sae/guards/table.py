"""The guards of ``slots`` requests: written when a request joins, decided in every pass as it reaches their places.

Per step there is only arithmetic on whole tensors: no loop over requests or guards, no transfer to the host.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from saeguard_sae.guards import deciding
from saeguard_sae.guards.deciding import over_tokens
from saeguard_sae.guards.probes import Probes, Sum
from saeguard_sae.guards.rule import NEVER, Guard, Seen
from saeguard_sae.guards.state import COLUMNS, KEPT, GuardStore, columns_of
from saeguard_sae.rows import Group, Rows, as_index

_REMEMBERED = 32
"""Sets of slots whose guards are kept at hand."""

Memory: TypeAlias = dict[str, Tensor]
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


class Guards:
    """Decides the guards of up to ``slots`` requests."""

    def __init__(self, slots: int, device: torch.device | str = "cpu") -> None:
        self._count, self._device = slots, torch.device(device)
        self._store = GuardStore(slots, self._device)
        self._slots: dict[int, _Slot] = {}
        self._made: dict[tuple[Guard, ...], _Slot] = {}
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

    def write(self, slot: int, guards: Sequence[Guard]) -> list[int]:
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

    def seen(self, slot: int) -> list[Seen]:
        """What the slot's guards saw, in their order. Waits for the device."""
        if slot not in self._slots:
            return []
        names, used = ("evaluated", "count", "position", "maximum"), len(self._slots[slot].numbers)
        cells = list(zip(*(self._store[name][slot, :used].tolist() for name in names), strict=True))
        found = [Seen(evaluated, on, None if first == NEVER else first, most) for evaluated, on, first, most in cells]
        return [found[column] for column in self._slots[slot].numbers]

    def tally(self, slot: int) -> Memory:
        """What the slot's guards remember, to ``resume`` from in a slot with the same ones; stays on the device."""
        if slot not in self._slots:
            return {}
        mine = self._slots[slot]
        return self._store.tally(slot, len(mine.numbers), mine.looks_back)

    def resume(self, slot: int, memory: Memory) -> None:
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
        scan = deciding.hold(comes, stays, inside, before["on"], before["position"] < NEVER)
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
            largest = deciding.running_maximum(value, inside, store["maximum"][live.at, : live.used])
            looked = torch.where(cells["is_maximum"], largest, looked)
        u = cells["sign"] * looked
        comes, stays = u >= cells["threshold"], u >= cells["release"]
        if not windowed:
            return comes, stays
        first = {name: cell[..., :windowed] for name, cell in cells.items()}
        scope, is_count = inside[..., :windowed], first["is_count"]
        own = torch.where(is_count, comes[..., :windowed].double(), value[..., :windowed])
        sums, ring = deciding.window_sums(own, scope, store.ring[live.at, :windowed], first["tokens"][:, 0])
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

    def _make(self, guards: Sequence[Guard]) -> _Slot:
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

    def _sums(self, guards: Sequence[Guard]) -> dict[tuple[Hashable, Hashable], list[Sum]]:
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
