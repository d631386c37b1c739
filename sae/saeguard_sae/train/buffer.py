"""Activations of many tokens at several sites, drawn in random order, the same tokens at every site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.site import Site


class Buffer:
    """Holds up to ``capacity`` tokens. Each token that is added is drawn once, and none is lost.

    A draw takes tokens from an order that was shuffled over all that were held at the time. It is shuffled again, new
    tokens included, when half of the capacity has been drawn from it: each draw is from at least that many, or from all
    there are. Cost: a draw's own rows, and a random order of ``capacity`` numbers once in half a capacity.
    """

    def __init__(
        self, widths: Mapping[Site, int], capacity: int, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self.capacity = capacity
        self._storage = {
            site: torch.empty(capacity, width, dtype=dtype, device=device) for site, width in widths.items()
        }
        self._device = device
        self._random = torch.Generator().manual_seed(seed)
        self._free = torch.arange(capacity, device=device)
        self._ready = self._free[:0]
        self._fresh: list[Tensor] = []
        self._n_fresh = 0

    @property
    def free(self) -> int:
        """How many tokens can be added."""
        return len(self._free)

    @property
    def held(self) -> int:
        """How many tokens can be drawn."""
        return self.capacity - len(self._free)

    def add(self, tokens: Mapping[Site, Tensor]) -> None:
        """Takes tokens in: at each site [n, width], ``n`` at most ``free``."""
        n = len(next(iter(tokens.values())))
        assert n <= self.free, "whoever adds asks how much fits"
        slots, self._free = self._free[:n], self._free[n:]
        for site, storage in self._storage.items():
            storage.index_copy_(0, slots, tokens[site].to(storage))
        self._fresh.append(slots)
        self._n_fresh += n

    def draw(self, n: int) -> dict[Site, Tensor]:
        """Takes ``n`` tokens out, at most ``held``: at each site float32 [n, width]."""
        assert n <= self.held, "whoever draws fills first"
        if len(self._ready) < max(n, self.capacity // 2) and self._n_fresh:
            self._mix()
        left = len(self._ready) - n
        slots, self._ready = self._ready[left:], self._ready[:left]
        self._free = torch.cat([self._free, slots])
        return {site: storage[slots].float() for site, storage in self._storage.items()}

    def state(self) -> dict[str, Any]:
        """All that is held, in its order: tensors and plain values."""
        slots = self._held_slots()
        return {
            "tokens": {str(site): storage[slots] for site, storage in self._storage.items()},
            "ready": len(self._ready),
            "random": self._random.get_state(),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Holds what a buffer of the same shape held when ``state`` was taken, and draws as it would have drawn."""
        n = 0
        for site, storage in self._storage.items():
            rows = state["tokens"][str(site)]
            n = len(rows)
            storage[:n] = rows.to(storage)
        order, ready = torch.arange(self.capacity, device=self._device), state["ready"]
        self._ready, self._free = order[:ready], order[n:]
        self._fresh, self._n_fresh = [order[ready:n]], n - ready
        self._random.set_state(state["random"].cpu())

    def _mix(self) -> None:
        slots = self._held_slots()
        self._ready = slots[torch.randperm(len(slots), generator=self._random).to(self._device)]
        self._fresh, self._n_fresh = [], 0

    def _held_slots(self) -> Tensor:
        return torch.cat([self._ready, *self._fresh])


def buffer_bytes(widths: Mapping[Site, int], capacity: int, dtype: torch.dtype) -> int:
    """Memory of a buffer, its bookkeeping included (three lists of int64)."""
    return capacity * (sum(widths.values()) * dtype.itemsize + 24)
