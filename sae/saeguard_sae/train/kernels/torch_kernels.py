"""The sparse arithmetic of a training step: what it works on, what kernels do, and the kernels in torch.

They are for every device, and what the compiled ones are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from saeguard_sae.train.parallel import ALONE, Mesh
from saeguard_sae.train.settings import Precision

_INT8 = 127
"""Largest integer of a row."""
_TOKENS = 512
"""Whose pre-activations are held at once."""
_PAIRS = 1 << 16
"""Pairs whose rows are gathered at once."""
_DERIVED = ("g_enc", "g_bias", "g_dec", "active", "low_precision")
"""Fields of feature rows that are no part of their state."""


class Pairs(NamedTuple):
    """Token r has the features ``feature[starts[r]:starts[r + 1]]``, ascending."""

    starts: Tensor
    """int64 [B + 1]"""
    feature: Tensor
    """int32 [n]"""

    @classmethod
    def join(cls, parts: list[Pairs]) -> Pairs:
        if len(parts) == 1:
            return parts[0]
        counts = torch.cat([part.starts.diff() for part in parts])
        return cls(starts(counts), torch.cat([part.feature for part in parts]))

    def rows(self) -> Tensor:
        """int64 [n] the token of each pair."""
        tokens = torch.arange(len(self.starts) - 1, device=self.starts.device)
        return tokens.repeat_interleave(self.starts.diff(), output_size=len(self.feature))

    def keep(self, mask: Tensor) -> Pairs:
        """Those where ``mask`` [n] is True."""
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        return Pairs(before[self.starts], self.feature[mask])


class Decoded(NamedTuple):
    """Reconstructions by pairs of B tokens at L levels, whose features end at rising widths."""

    pulls: Tensor
    """[L, B, d] the gradient by the reconstruction of a feature whose first level this is."""
    last: Tensor
    """[B, d] the last level's error, reconstruction minus target."""
    squares: Tensor
    """[B, L] squared length of each level's error."""
    slopes: Tensor
    """[n] the gradient by each pair's value; 0 where it does not fire."""


def starts(counts: Tensor) -> Tensor:
    """int64 [B] pairs per token -> [B + 1]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


class PreActivations(NamedTuple):
    """Pre-activations [n, F] of some tokens: ``values`` themselves where there are no scales, else integers with
    ``values * of_row[:, None] * of_feature + bias``."""

    values: Tensor
    of_row: Tensor | None = None
    of_feature: Tensor | None = None
    bias: Tensor | None = None

    def wide(self) -> Tensor:
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
class LowPrecision:
    """Rows [n, d] in float32, bfloat16, or int8 with a ``scale`` [n] each: enough to propose which features fire."""

    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, precision: Precision) -> LowPrecision:
        """float32 rows are taken as they are."""
        if precision == "bfloat16":
            return cls(rows.bfloat16())
        # torch's product of integers is wrong for a single column (2.13: it leaves its result as it finds it).
        return cls(*shrink(rows)) if precision == "int8" and rows.shape[1] > 1 else cls(rows)

    def write(self, at: slice | Tensor, rows: Tensor) -> None:
        if self.values.dtype == torch.float32:
            return  # they are the rows themselves
        if self.scale is None:
            self.values[at] = rows.bfloat16()
        else:
            self.values[at], self.scale[at] = shrink(rows)

    def at(self, index: Tensor) -> LowPrecision:
        values = self.values[index]
        if self.scale is None:
            return LowPrecision(values)
        scale = self.scale[index]
        # On GPUs the product of integers is for multiples of eight rows only.
        return LowPrecision((values * scale[:, None]).bfloat16()) if values.is_cuda else LowPrecision(values, scale)

    def products(self, x: Tensor, bias: Tensor) -> Iterator[PreActivations]:
        """Pre-activations of x [B, d] in float32, bias [n]: a few hundred tokens at a time, looked at while they are in
        the cache. Each is overwritten by the next."""
        if self.scale is None:
            bias = bias.to(self.values.dtype)
            for part in torch.split(x.to(self.values.dtype), _TOKENS):
                yield PreActivations(F.linear(part, self.values, bias))
            return
        # Memory that is asked for anew for every product costs as much as a tenth of the product.
        room = self.scale.new_empty((min(len(x), _TOKENS), len(bias)), dtype=torch.int32)
        for part, scale in zip(*(torch.split(tokens, _TOKENS) for tokens in shrink(x)), strict=True):
            sums = torch._int_mm(part, self.values.T, out=room[: len(part)])
            yield PreActivations(sums, scale, self.scale, bias)


def shrink(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, d] -> integers of -127 to 127, int8, and what one of them stands for in each row [n]."""
    most = rows.abs().amax(dim=1)
    scale = torch.where(most > 0, most / _INT8, 1.0)
    return (rows * (1 / scale)[:, None]).round().to(torch.int8), scale


@dataclass(frozen=True, slots=True)
class AdamStep:
    """Adam (Kingma and Ba 2014) of one step; gradients are multiplied by ``scale`` first."""

    rate: float
    scale: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True, slots=True, eq=False)
class FeatureRows:
    """Weights, gradients and moments, feature by feature. Rows without a gradient in a step are left as they are, and
    every row has a clock of its own: Adam as if there were an optimiser for each feature, run when it has a gradient.
    """

    W_enc: Tensor
    """[F, d_in]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, d_out], unit rows"""
    g_enc: Tensor
    g_bias: Tensor
    g_dec: Tensor
    """Gradients; what they hold of a row that is not ``active`` means nothing."""
    m_enc: Tensor
    v_enc: Tensor
    m_bias: Tensor
    v_bias: Tensor
    m_dec: Tensor
    v_dec: Tensor
    active: Tensor
    """uint8 [F] whether the row has a gradient."""
    clock: Tensor
    """int32 [F] updates so far."""
    low_precision: LowPrecision
    """``W_enc`` again, as what proposes features reads it."""

    @classmethod
    def new(cls, W_enc: Tensor, W_dec: Tensor, precision: Precision = "float32") -> FeatureRows:
        """Untrained: W_enc [F, d_in] and W_dec [F, d_out] are taken, biases are 0."""
        count = len(W_enc)
        bias = W_enc.new_zeros(count)
        return cls(
            W_enc, bias, W_dec,
            torch.zeros_like(W_enc), bias.clone(), torch.zeros_like(W_dec),
            torch.zeros_like(W_enc), torch.zeros_like(W_enc), bias.clone(), bias.clone(),
            torch.zeros_like(W_dec), torch.zeros_like(W_dec),
            torch.zeros(count, dtype=torch.uint8, device=W_enc.device),
            torch.zeros(count, dtype=torch.int32, device=W_enc.device),
            LowPrecision.of(W_enc, precision),
        )  # fmt: skip

    def restart(self, features: Tensor, scale: float) -> None:
        """These features (bool [F]) begin anew: ``scale`` times the decoder row to encode with, no bias, no moments."""
        at = features.nonzero().flatten()
        self.W_enc[at] = scale * self.W_dec[at]
        moments = (self.m_enc, self.v_enc, self.m_bias, self.v_bias, self.m_dec, self.v_dec)
        for tensor in (self.b_enc, *moments, self.clock):
            tensor.index_fill_(0, at, 0)
        self.low_precision.write(at, self.W_enc[at])

    def state(self) -> dict[str, Tensor]:
        """What must be kept to go on; gradients and the copy in low precision need not."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _DERIVED}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.active.zero_()
        self.low_precision.write(slice(None), self.W_enc)


class Kernels(Protocol):
    """B tokens, F features, n pairs, L levels. Nothing here is part of an autograd graph."""

    name: str

    def above(self, x: Tensor, W: LowPrecision, bias: Tensor, cut: float) -> Pairs:
        """x [B, d], W [F, d], bias [F] -> pairs whose pre-activation is above ``cut``, which must not be negative."""
        ...

    def largest(self, x: Tensor, W: LowPrecision, bias: Tensor, k: int) -> tuple[Pairs, Tensor]:
        """x [B, d], W [F, d], bias [F] -> each token's k largest pre-activations of those that are positive, of equal
        ones those that come first; and these [n], as exactly as W is."""
        ...

    def strongest(self, pairs: Pairs, values: Tensor, k: int) -> Tensor:
        """values [n], none below 0 -> bool [n] whether a pair is among its token's k largest; of equal ones those that
        come first."""
        ...

    def read(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, pairs: Pairs) -> Tensor:
        """x [B, d_in] -> [n] ``relu(x . w + b)`` of each pair."""
        ...

    def decode(
        self, target: Tensor, W_dec: Tensor, pairs: Pairs, values: Tensor, ends: Tensor, weights: Tensor
    ) -> Decoded:
        """target [B, d_out], values [n]; ``ends`` int32 [L] the levels' widths, ``weights`` [L] of their errors."""
        ...

    def gradients(
        self, x: Tensor, decoded: Decoded, pairs: Pairs, values: Tensor, ends: Tensor, rows: FeatureRows
    ) -> None:
        """Adds the pairs' gradients to the features' rows, and makes these active."""
        ...

    def lengths(self, rows: FeatureRows) -> Tensor:
        """[F] squared length of each active row's gradient without the decoder's part along its own row; else 0."""
        ...

    def adam(self, rows: FeatureRows, adam: AdamStep) -> None:
        """Updates the active rows, decoder rows staying on the unit sphere; no row is active afterwards."""
        ...


class TorchKernels:
    name = "torch"

    def __init__(self, mesh: Mesh = ALONE) -> None:
        self._mesh = mesh

    def above(self, x: Tensor, W: LowPrecision, bias: Tensor, cut: float) -> Pairs:
        return Pairs.join([_where(pre.wide() > cut) for pre in W.products(x, bias)])

    def largest(self, x: Tensor, W: LowPrecision, bias: Tensor, k: int) -> tuple[Pairs, Tensor]:
        pairs, values = [], []
        for pre in W.products(x, bias):
            wide = pre.wide()
            best, index = wide.sort(dim=1, descending=True, stable=True)
            mask = torch.zeros_like(wide, dtype=torch.bool).scatter_(1, index[:, :k], best[:, :k] > 0)
            pairs.append(_where(mask))
            values.append(wide[mask].float())
        return Pairs.join(pairs), torch.cat(values)

    def strongest(self, pairs: Pairs, values: Tensor, k: int) -> Tensor:
        row = pairs.rows()
        by_value = values.argsort(descending=True, stable=True)
        order = by_value[row[by_value].argsort(stable=True)]
        rank = torch.arange(len(values), device=values.device) - pairs.starts[row]
        return torch.empty_like(row, dtype=torch.bool).scatter_(0, order, rank < k)

    def read(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, pairs: Pairs) -> Tensor:
        return (_dots(x, W_enc, pairs.rows(), pairs.feature.long()) + b_enc[pairs.feature]).relu()

    def decode(
        self, target: Tensor, W_dec: Tensor, pairs: Pairs, values: Tensor, ends: Tensor, weights: Tensor
    ) -> Decoded:
        rows, feature = pairs.rows(), pairs.feature.long()
        level = torch.bucketize(pairs.feature, ends, right=True)
        first = -target if self._mesh.shard == 0 else torch.zeros_like(target)
        errors = torch.stack([first] + [torch.zeros_like(target) for _ in range(len(ends) - 1)])
        flat = errors.view(-1, target.shape[1])
        for part in _parts(len(values)):
            flat.index_add_(0, level[part] * len(target) + rows[part], values[part, None] * W_dec[feature[part]])
        errors = self._mesh.sum_features(errors).cumsum(0)
        pulls = (errors * weights[:, None, None]).flip(0).cumsum(0).flip(0)
        slopes = _dots(pulls.view(-1, target.shape[1]), W_dec, level * len(target) + rows, feature)
        return Decoded(pulls, errors[-1], errors.square().sum(-1).T, slopes * (values > 0))

    def gradients(
        self, x: Tensor, decoded: Decoded, pairs: Pairs, values: Tensor, ends: Tensor, rows: FeatureRows
    ) -> None:
        fires = values > 0
        token, feature = pairs.rows()[fires], pairs.feature.long()[fires]
        values, slopes = values[fires], decoded.slopes[fires]
        touched = torch.zeros_like(rows.active).index_fill_(0, feature, 1)
        fresh = (touched.bool() & ~rows.active.bool()).nonzero().flatten()
        for tensor in (rows.g_enc, rows.g_bias, rows.g_dec):
            tensor.index_fill_(0, fresh, 0.0)
        level = torch.bucketize(feature.int(), ends, right=True)
        pulls = decoded.pulls.view(-1, decoded.pulls.shape[-1])
        for part in _parts(len(values)):
            pulled = pulls[level[part] * len(x) + token[part]]
            rows.g_dec.index_add_(0, feature[part], values[part, None] * pulled)
            rows.g_enc.index_add_(0, feature[part], slopes[part, None] * x[token[part]])
        rows.g_bias.index_add_(0, feature, slopes)
        rows.active.bitwise_or_(touched)

    def lengths(self, rows: FeatureRows) -> Tensor:
        along = (rows.g_dec * rows.W_dec).sum(1)
        dec = (rows.g_dec.square().sum(1) - along.square()).relu()
        return torch.where(rows.active.bool(), rows.g_enc.square().sum(1) + rows.g_bias.square() + dec, 0.0)

    def adam(self, rows: FeatureRows, adam: AdamStep) -> None:
        at = rows.active.nonzero().flatten()
        rows.active.zero_()
        rows.clock[at] += 1
        clock = rows.clock[at].double()
        step = (adam.rate / (1 - adam.beta1**clock)).float()
        root = (1 / (1 - adam.beta2**clock).sqrt()).float()

        def move(weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor) -> Tensor:
            wide = (slice(None), None) if weight.ndim == 2 else (slice(None),)
            first = adam.beta1 * m[at] + (1 - adam.beta1) * gradient
            second = adam.beta2 * v[at] + (1 - adam.beta2) * gradient.square()
            m[at], v[at] = first, second
            return weight[at] - step[wide] * first / (second.sqrt() * root[wide] + adam.eps)

        g_dec, unit = rows.g_dec[at], rows.W_dec[at]
        g_dec = (g_dec - (g_dec * unit).sum(1, keepdim=True) * unit) * adam.scale
        rows.W_enc[at] = move(rows.W_enc, rows.g_enc[at] * adam.scale, rows.m_enc, rows.v_enc)
        rows.b_enc[at] = move(rows.b_enc, rows.g_bias[at] * adam.scale, rows.m_bias, rows.v_bias)
        moved = move(rows.W_dec, g_dec, rows.m_dec, rows.v_dec)
        rows.W_dec[at] = moved / moved.norm(dim=1, keepdim=True)
        rows.low_precision.write(at, rows.W_enc[at])


def _where(mask: Tensor) -> Pairs:
    return Pairs(starts(mask.sum(1)), mask.nonzero()[:, 1].int())


def _dots(x: Tensor, W: Tensor, rows: Tensor, feature: Tensor) -> Tensor:
    """[n] products of rows of x and of W."""
    products = [(x[rows[part]] * W[feature[part]]).sum(1) for part in _parts(len(rows))]
    return torch.cat([x.new_zeros(0), *products])


def _parts(count: int) -> Iterator[slice]:
    """Few enough pairs at once that their gathered rows fit in memory."""
    return (slice(start, start + _PAIRS) for start in range(0, count, _PAIRS))
