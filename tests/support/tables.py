"""Edit tables on tokens that lie request by request, as tests have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.edit_table import EditTable
from saeguard_sae.rows import Rows, RowSpan


def edited(
    table: EditTable,
    x: Tensor,
    positions: Tensor | None = None,
    special: Tensor | None = None,
    sources: Mapping[Any, Tensor] | None = None,
) -> Tensor:
    """x [B, T, width] of slots 0 to B - 1 -> edited; positions from 0 and no special tokens unless given [B, T]."""
    out = table.apply(
        x.flatten(0, 1),
        rows(x, positions, special),
        {name: one.flatten(0, 1) for name, one in (sources or {}).items()},
    )
    return out.view_as(x)


def rows(x: Tensor, positions: Tensor | None = None, special: Tensor | None = None) -> Rows:
    """Those of x [B, T, ...] in slots 0 to B - 1."""
    count, length = x.shape[:2]
    if positions is None:
        positions = torch.arange(length, device=x.device).expand(count, -1)
    if special is None:
        special = torch.zeros(count, length, dtype=torch.bool, device=x.device)
    spans = [RowSpan(slot, slot * length, length) for slot in range(count)]
    return Rows.of(spans, positions.flatten(), special.flatten())
