"""Encoder weights, tokens and pre-activations in low precision: good enough to propose which features fire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saeguard_sae.train.kernels.pairs import Pairs
from saeguard_sae.train.settings import Precision

_LARGEST = 127
_TOKENS = 512


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

    def of(self, pairs: Pairs) -> Tensor:
        """[n] in float32: those of the pairs."""
        row, feature = pairs.rows(), pairs.feature.long()
        values = self.values[row, feature].float()
        if self.of_row is None or self.of_feature is None or self.bias is None:
            return values
        return values * (self.of_row[row] * self.of_feature[feature]) + self.bias[feature]


@dataclass(frozen=True, slots=True, eq=False)
class Rough:
    """Rows [n, d] in float32, bfloat16, or int8 with a ``scale`` [n] each."""

    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, precision: Precision) -> Rough:
        """float32 rows are taken as they are."""
        if precision == "bfloat16":
            return cls(rows.bfloat16())
        # torch's product of integers is wrong for a single column (2.13: it leaves its result as it finds it).
        return cls(*shrink(rows)) if precision == "int8" and rows.shape[1] > 1 else cls(rows)

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

    def at(self, index: Tensor) -> Rough:
        """Some rows, copied."""
        values = self.values[index]
        if self.scale is None:
            return Rough(values)
        scale = self.scale[index]
        # On GPUs the product of integers is for multiples of eight rows only.
        return Rough((values * scale[:, None]).bfloat16()) if values.is_cuda else Rough(values, scale)

    def products(self, x: Tensor, bias: Tensor) -> Iterator[Pre]:
        """Pre-activations of x [B, d] in float32, bias [n]: a few hundred tokens at a time, so that they are looked at
        while they are in the cache. What was given is overwritten by the next."""
        tokens = self.like(x)
        if tokens.scale is None or self.scale is None:
            bias = bias.to(self.values.dtype)
            for part in torch.split(tokens.values, _TOKENS):
                yield Pre(F.linear(part, self.values, bias))
            return
        # Memory that is asked for anew for every product costs as much as a tenth of the product.
        room = self.scale.new_empty((min(len(x), _TOKENS), len(bias)), dtype=torch.int32)
        for part, scale in zip(torch.split(tokens.values, _TOKENS), torch.split(tokens.scale, _TOKENS), strict=True):
            sums = torch._int_mm(part, self.values.T, out=room[: len(part)])
            yield Pre(sums, scale, self.scale, bias)


def shrink(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, d] -> integers of -127 to 127, int8, and what one of them stands for in each row [n]."""
    most = rows.abs().amax(dim=1)
    scale = torch.where(most > 0, most / _LARGEST, 1.0)
    return (rows * (1 / scale)[:, None]).round().to(torch.int8), scale
