"""What guards are and what they remember, as tensors [slots, capacity], grown and cleared together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saeguard_sae.columns import Kind
from saeguard_sae.guards.rule import NEVER, Guard

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


class GuardStore:
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


def columns_of(guards: Sequence[Guard], places: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """What n guards are, decided at the places with these numbers: [n] by column."""
    lists = _lists(guards, places)
    return {name: torch.tensor(values, dtype=COLUMNS[name].dtype, device=device) for name, values in lists.items()}


def _lists(guards: Sequence[Guard], places: Sequence[int]) -> dict[str, list[float] | list[int] | list[bool]]:
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


def _least(one: Guard, threshold: float) -> float:
    """The smallest number that compares true."""
    return math.nextafter(threshold, math.inf) if one.comparison in ("above", "below") else threshold
