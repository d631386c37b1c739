"""Every live request's edits at one site, as columns ``slot x edit``: written when it joins, read every step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.bank import Bank, Column, Counts

__all__ = ["FOREVER", "Column", "Counts", "EditTable"]

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
        self._order: dict[int, list[Hashable]] = {}

    def is_live(self, slots: slice) -> bool:
        """Whether any of these slots has a column."""
        return any(bank.used(slots) for bank in self._banks.values())

    def reads(self, source: Hashable, slots: slice) -> bool:
        """Whether a column of these slots reads that source."""
        return source in self._banks and self._banks[source].used(slots) > 0

    def write(self, slot: int, columns: Sequence[Column], max_relative_edit: float = float("inf")) -> None:
        """Gives a free slot its columns, in this order. ``max_relative_edit`` limits ``|edit| / |x|`` per token."""
        assert slot not in self._order, "the slot still holds another request's edits"
        if not columns:
            return
        for source in dict.fromkeys(column.source for column in columns):
            mine = [column for column in columns if column.source == source]
            self._bank(source, mine[0].coder.d_in).write(slot, mine)
        self._limit[slot] = max_relative_edit
        self._order[slot] = [column.source for column in columns]

    def clear(self, slot: int) -> None:
        """Frees the slot; nothing of its request stays."""
        if self._order.pop(slot, None) is not None:
            for bank in self._banks.values():
                bank.clear(slot)
            self._limit[slot] = torch.inf

    def move(self, source: int, target: int) -> None:
        """Moves a slot's columns and counts to a free slot."""
        assert target not in self._order, "the target slot still holds another request's edits"
        if source in self._order:
            for bank in self._banks.values():
                bank.move(source, target)
            self._limit[target] = self._limit[source]
            self._order[target] = self._order.pop(source)

    def apply(
        self,
        x: Tensor,
        slots: slice,
        positions: Tensor,
        special: Tensor,
        sources: Mapping[Any, Tensor] | None = None,
    ) -> Tensor:
        """x [B, T, width] of B consecutive slots -> the edited x in its dtype; tokens out of scope come back
        bit-identical.

        Args:
            slots: the slot of each row of x.
            positions: int64 [B, T], the token's position in its request.
            special: bool [B, T], True for special tokens.
            sources: the tensors [B, T, d_read] that columns with a ``source`` read.
        """
        live = {source: bank for source, bank in self._banks.items() if bank.used(slots)}
        for bank in self._banks.values():
            bank.values = None
        if not live:
            return x
        wide = x.float()
        read: dict[Hashable, Tensor] = {**(sources or {}), None: wide}
        changes = {key: bank.change(read[key].float(), slots, positions, special) for key, bank in live.items()}
        delta = reduce(torch.add, (one.delta for one in changes.values()))
        norm, length = wide.norm(dim=-1), delta.norm(dim=-1)
        allowed = self._limit[slots, None] * norm
        capped = length > allowed
        shrink = torch.where(capped, allowed / length, 1.0)
        for key, change in changes.items():
            live[key].count(slots, change, shrink, norm, capped)
        eligible = torch.cat([one.eligible for one in changes.values()], dim=-1)
        edited = (wide + delta * shrink[..., None]).to(x.dtype)
        return torch.where(eligible.any(dim=-1, keepdim=True), edited, x)

    def counts(self, slot: int) -> list[Counts]:
        """What each of the slot's columns did, in their order. Waits for the device."""
        found = {source: iter(bank.counts(slot)) for source, bank in self._banks.items()}
        return [next(found[source]) for source in self._order.get(slot, ())]

    def values(self, slot: int, row: int, index: int) -> Tensor:
        """[T] what a slot's column read in the last step, in which the slot was row ``row``."""
        order = self._order[slot]
        bank = self._banks[order[index]]
        assert bank.values is not None, "the column had nothing to do"
        return bank.values[row, :, order[:index].count(order[index])]

    def _bank(self, source: Hashable, d_read: int) -> Bank:
        if source not in self._banks:
            self._banks[source] = Bank(self._slots, d_read, self._width, self._device, self._capacity)
        return self._banks[source]
