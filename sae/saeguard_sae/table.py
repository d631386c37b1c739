"""Every live request's edits at one site, as columns ``slot x edit``: written when it joins, read every step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.bank import Bank, Tally
from saeguard_sae.columns import Column, Counts
from saeguard_sae.rows import Group, Rows

__all__ = ["FOREVER", "Column", "Counts", "EditTable", "Tally"]

FOREVER: int = torch.iinfo(torch.int64).max
"""A ``last`` position that is never reached."""


class EditTable:
    """Edits at one site of width ``width`` for ``slots`` requests. While it is empty, ``apply`` returns x itself.

    All edits of a site are measured before any of them is made, and summed, whatever tensor they read.
    """

    def __init__(self, slots: int, width: int, device: torch.device | str = "cpu", capacity: int = 8) -> None:
        self._slots, self._width, self._device = slots, width, torch.device(device)
        self._capacity = capacity
        self._banks: dict[Hashable, Bank] = {}
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

    def write(self, slot: int, columns: Sequence[Column], max_relative_edit: float = float("inf")) -> None:
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

    def counts(self, slot: int) -> list[Counts]:
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
        live: Mapping[Hashable, Bank],
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

    def _bank(self, source: Hashable, d_read: int) -> Bank:
        if source not in self._banks:
            self._banks[source] = Bank(self._slots, d_read, self._width, self._device, self._capacity)
        return self._banks[source]
