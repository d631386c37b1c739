"""KV in slots, behind the cache interface of transformers: one row per request, reused when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(slots=True)
class Window:
    """The part of the cache that this forward pass writes and reads: ``slots``, and keys up to ``length``.

    ``positions`` [B, T] are where the new tokens go; ``rows`` [B, 1] their slots, as an index.
    """

    slots: slice = field(default_factory=lambda: slice(0, 0))
    length: int = 0
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.int64))
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, [slots, context, heads, head size], so that a prefix of slots is a view."""

    is_sliding = False

    def __init__(self, slots: int, context: int, window: Window) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.context, self.window = slots, context, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates on the first forward pass, when the shapes are known. [B, heads, T, head size]"""

        def make(like: Tensor) -> Tensor:
            return like.new_zeros(self.slots, self.context, like.shape[1], like.shape[3])

        self.keys, self.values = make(key_states), make(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values into their slots and gives back all up to the window's length."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        here = self.window
        self._keys[here.rows, here.positions] = key_states.transpose(1, 2)
        self._values[here.rows, here.positions] = value_states.transpose(1, 2)
        keys, values = self._keys[here.slots, : here.length], self._values[here.slots, : here.length]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.length, 0

    def get_seq_length(self) -> int:
        return self.window.length - self.window.positions.shape[1]

    def get_max_length(self) -> int:
        return self.context

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a slot's first ``length`` positions to a free slot."""
        if self.is_initialized:
            self._keys[target, :length] = self._keys[source, :length]
            self._values[target, :length] = self._values[source, :length]
            self.wipe(source, length)

    def wipe(self, slot: int, length: int) -> None:
        """Zeroes a slot's first ``length`` positions."""
        if self.is_initialized:
            self._keys[slot, :length].zero_()
            self._values[slot, :length].zero_()

    @property
    def _keys(self) -> Tensor:
        assert self.keys is not None
        return self.keys

    @property
    def _values(self) -> Tensor:
        assert self.values is not None
        return self.values


class SlotCache(Cache):
    """KV of every layer for ``slots`` requests of up to ``context`` tokens."""

    def __init__(self, num_layers: int, slots: int, context: int) -> None:
        self.window = Window()
        self.slot_layers = [SlotLayer(slots, context, self.window) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a request's KV of ``length`` positions to a free slot."""
        for layer in self.slot_layers:
            layer.move(source, target, length)

    def wipe(self, slot: int, length: int) -> None:
        """Zeroes the KV of a request that left, so that a free slot is all zeros.

        Masked positions still meet the softmax, and zero times NaN is NaN: what an extreme edit left behind would
        poison the slot's next request.
        """
        for layer in self.slot_layers:
            layer.wipe(slot, length)
