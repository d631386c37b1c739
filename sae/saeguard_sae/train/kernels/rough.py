"""Encoder weights, tokens and pre-activations in low precision: good enough to propose which features fire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saeguard_sae.train.settings import Precision

_LARGEST = 127


class Pre(NamedTuple):
    """Pre-activations [n, F] of some tokens: ``values`` themselves where there are no scales, else integers with
    ``values * of_row[:, None] * of_feature + bias``."""

    values: Tensor
    of_row: Tensor | None = None
    of_feature: Tensor | None = None
    bias: Tensor | None = None

    def wide(self) -> Tensor:
        """[n, F] in float32, or as they are."""
        if self.of_row is None or self.of_feature is None or self.bias is None:
            return self.values
        return self.values.float() * (self.of_row[:, None] * self.of_feature) + self.bias

    def part(self, rows: int, features: Tensor) -> Pre:
        """Of the first tokens, and of these features."""
        values = self.values[:rows].index_select(1, features)
        if self.of_row is None or self.of_feature is None or self.bias is None:
            return Pre(values)
        return Pre(values, self.of_row[:rows], self.of_feature[features], self.bias[features])


@dataclass(frozen=True, slots=True, eq=False)
class Rough:
    """Rows [n, d] in float32, bfloat16, or int8 with a ``scale`` [n] each."""

    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, precision: Precision) -> Rough:
        """float32 rows are taken as they are."""
        if precision == "int8":
            return cls(*shrink(rows))
        return cls(rows if precision == "float32" else rows.bfloat16())

    def write(self, at: slice | Tensor, rows: Tensor) -> None:
        """Some rows anew."""
        if self.values.dtype == torch.float32:
            return  # they are the rows themselves
        if self.scale is None:
            self.values[at] = rows.bfloat16()
        else:
            self.values[at], self.scale[at] = shrink(rows)

    def like(self, x: Tensor) -> Rough:
        """x [n, d] in the same precision."""
        if self.scale is not None:
            return Rough(*shrink(x))
        return Rough(x.to(self.values.dtype))

    def product(self, x: Rough, start: int, end: int, bias: Tensor, room: Tensor | None = None) -> Pre:
        """Pre-activations of the tokens from ``start`` to ``end``.

        Args:
            bias: [F] in float32.
            room: int32 [n or more, F] that integers may be put into, until the next product.
        """
        if x.scale is None or self.scale is None:
            return Pre(F.linear(x.values[start:end], self.values, bias.to(self.values.dtype)))
        part, weights = x.values[start:end], self.values.T
        sums = torch._int_mm(part, weights) if room is None else torch._int_mm(part, weights, out=room[: len(part)])
        return Pre(sums, x.scale[start:end], self.scale, bias)


def shrink(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, d] -> integers of -127 to 127, int8, and what one of them stands for in each row [n]."""
    most = rows.abs().amax(dim=1)
    scale = torch.where(most > 0, most / _LARGEST, 1.0)
    return (rows * (1 / scale)[:, None]).round().to(torch.int8), scale
