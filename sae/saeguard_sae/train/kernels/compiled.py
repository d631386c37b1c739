"""The kernels in C++, beside this file: compiled for this machine on first use and kept in the user's cache."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from saeguard_sae.train.settings import Precision

# Which features fire on which tokens, as flat lists.


class Pairs(NamedTuple):
    """Token r has the features ``feature[starts[r]:starts[r + 1]]``, ascending."""

    starts: Tensor
    """int64 [B + 1]"""
    feature: Tensor
    """int32 [n]"""

    @classmethod
    def join(cls, parts: list[Pairs]) -> Pairs:
        """Those of consecutive tokens, one after the other."""
        if len(parts) == 1:
            return parts[0]
        counts = torch.cat([one.starts.diff() for one in parts])
        return cls(starts(counts), torch.cat([one.feature for one in parts]))

    def rows(self) -> Tensor:
        """int64 [n] the token of each pair."""
        tokens = torch.arange(len(self.starts) - 1, device=self.starts.device)
        return tokens.repeat_interleave(self.starts.diff(), output_size=len(self.feature))

    def keep(self, mask: Tensor) -> Pairs:
        """Those where ``mask`` [n] is True."""
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        return Pairs(before[self.starts], self.feature[mask])


class Decoded(NamedTuple):
    """What pairs make of B tokens at L levels, whose features end at rising widths."""

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


# Encoder weights, tokens and pre-activations in low precision: good enough to propose which features fire.


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


# The trained tensors of every feature, one row each, with what the optimiser keeps of it.


@dataclass(frozen=True, slots=True)
class Rates:
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
    rough: Rough
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
            Rough.of(W_enc, precision),
        )  # fmt: skip

    def restart(self, chosen: Tensor, scale: float) -> None:
        """These features (bool [F]) begin anew: ``scale`` times the decoder row to encode with, no bias, no moments."""
        at = chosen.nonzero().flatten()
        self.W_enc[at] = scale * self.W_dec[at]
        for tensor in (
            self.b_enc,
            self.m_enc,
            self.v_enc,
            self.m_bias,
            self.v_bias,
            self.m_dec,
            self.v_dec,
            self.clock,
        ):
            tensor.index_fill_(0, at, 0)
        self.rough.write(at, self.W_enc[at])

    def state(self) -> dict[str, Tensor]:
        """What must be kept to go on; gradients and the rough copy need not."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _MADE_AGAIN}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from there."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.active.zero_()
        self.rough.write(slice(None), self.W_enc)


_MADE_AGAIN = ("g_enc", "g_bias", "g_dec", "active", "rough")


class CompiledKernels:
    """See ``Kernels``. Tensors must be contiguous, on the CPU, and of the types that ``Kernels`` names."""

    name = "compiled"

    def __init__(self, library: Path) -> None:
        self._c = ctypes.CDLL(str(library))
        self._c.saeguard_search.restype = ctypes.c_void_p
        self.can_search = bool(self._c.saeguard_can_search())
        """Whether products of small integers are searched while they are made, on this processor."""
        self._room = 128
        """Pairs of one token that ``above`` expects at most; grows."""

    def above(self, x: Tensor, W: Rough, bias: Tensor, cut: float) -> Pairs:
        """See ``Kernels.above``."""
        if self.can_search and W.scale is not None:
            return self._search(x, W, bias, 0, cut)[0]
        return Pairs.join([self._above(pre, cut) for pre in W.products(x, bias)])

    def largest(self, x: Tensor, W: Rough, bias: Tensor, k: int) -> tuple[Pairs, Tensor]:
        """See ``Kernels.largest``."""
        if self.can_search and W.scale is not None:
            return self._search(x, W, bias, min(k, len(bias)), 0.0)
        found, values = [], []
        for pre in W.products(x, bias):
            found.append(self._largest(pre, k))
            values.append(pre.of(found[-1]))
        return Pairs.join(found), torch.cat(values)

    def strongest(self, pairs: Pairs, values: Tensor, k: int) -> Tensor:
        """See ``Kernels.strongest``."""
        kept = torch.empty(len(values), dtype=torch.bool)
        self._c.saeguard_strongest(
            _n(len(pairs.starts) - 1), _at(pairs.starts, torch.int64), _at(values), _n(k), _at(kept, torch.bool)
        )
        return kept

    def _search(self, x: Tensor, W: Rough, bias: Tensor, k: int, cut: float) -> tuple[Pairs, Tensor]:
        """The k largest, or if k is 0 all above the cut; and how large they are."""
        assert W.scale is not None, "weights in integers"
        count, width = x.shape
        small, scale = torch.empty(count, width, dtype=torch.int8), x.new_empty(count)
        self._c.saeguard_shrink(_at(x), _n(count), _n(width), _at(small, torch.int8), _at(scale))
        counts = torch.empty(count, dtype=torch.int64)
        tokens, weights = (_at(small, torch.int8), _at(scale)), (_at(W.values, torch.int8), _at(W.scale))
        sizes = _n(count), _n(width), _n(len(bias)), _n(k)
        handle = self._c.saeguard_search(
            *tokens, *weights, _at(bias), *sizes, ctypes.c_float(cut), _at(counts, torch.int64)
        )
        begins = starts(counts)
        feature, values = torch.empty(int(begins[-1]), dtype=torch.int32), x.new_empty(int(begins[-1]))
        self._c.saeguard_take(ctypes.c_void_p(handle), _at(begins, torch.int64), _at(feature, torch.int32), _at(values))
        return Pairs(begins, feature), values

    def _above(self, pre: Pre, cut: float) -> Pairs:
        count, width = pre.values.shape
        while True:
            room = min(self._room, width)
            feature, counts = torch.empty(count, room, dtype=torch.int32), torch.empty(count, dtype=torch.int64)
            found = _n(room), _at(feature, torch.int32), _at(counts, torch.int64)
            self._c.saeguard_above(*_pre(pre), _n(count), _n(width), ctypes.c_float(cut), *found)
            if int(counts.max()) <= room:
                return Pairs(starts(counts), feature[torch.arange(room) < counts[:, None]])
            self._room = 2 * int(counts.max())

    def _largest(self, pre: Pre, k: int) -> Pairs:
        count, width = pre.values.shape
        k = min(k, width)
        feature, counts = torch.empty(count, k, dtype=torch.int32), torch.empty(count, dtype=torch.int64)
        found = _at(feature, torch.int32), _at(counts, torch.int64)
        self._c.saeguard_largest(*_pre(pre), _n(count), _n(width), _n(k), *found)
        return Pairs(starts(counts), feature[torch.arange(k) < counts[:, None]])

    def read(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, pairs: Pairs) -> Tensor:
        """See ``Kernels.read``."""
        values = x.new_empty(len(pairs.feature))
        self._c.saeguard_read(
            _at(x), _at(W_enc), _at(b_enc), _n(len(x)), _n(x.shape[1]), *_pairs(pairs), _at(values)
        )  # fmt: skip
        return values

    def decode(
        self, target: Tensor, W_dec: Tensor, pairs: Pairs, values: Tensor, ends: Tensor, weights: Tensor
    ) -> Decoded:
        """See ``Kernels.decode``."""
        count, width = target.shape
        levels = len(ends)
        pulls, last = target.new_empty(levels, count, width), torch.empty_like(target)
        squares, slopes = target.new_empty(count, levels), torch.empty_like(values)
        self._c.saeguard_decode(
            _at(target), _at(W_dec), _n(count), _n(width), *_pairs(pairs), _at(values), _at(ends, torch.int32),
            _at(weights), _n(levels), _at(pulls), _at(last), _at(squares), _at(slopes),
        )  # fmt: skip
        return Decoded(pulls, last, squares, slopes)

    def gradients(
        self, x: Tensor, decoded: Decoded, pairs: Pairs, values: Tensor, ends: Tensor, rows: FeatureRows
    ) -> None:
        """See ``Kernels.gradients``."""
        widths = (_n(x.shape[1]), _n(decoded.pulls.shape[-1]), _n(len(rows.active)))
        self._c.saeguard_gradients(
            _at(x), _at(decoded.pulls), _n(len(x)), *widths, *_pairs(pairs), _at(values), _at(decoded.slopes),
            _at(ends, torch.int32), _n(len(ends)),
            _at(rows.g_enc), _at(rows.g_bias), _at(rows.g_dec), _at(rows.active, torch.uint8),
        )  # fmt: skip

    def lengths(self, rows: FeatureRows) -> Tensor:
        """See ``Kernels.lengths``."""
        squares = torch.empty_like(rows.b_enc)
        self._c.saeguard_lengths(
            _at(rows.W_dec), *_widths(rows), _n(len(rows.active)), _at(rows.active, torch.uint8),
            _at(rows.g_enc), _at(rows.g_bias), _at(rows.g_dec), _at(squares),
        )  # fmt: skip
        return squares

    def adam(self, rows: FeatureRows, rates: Rates) -> None:
        """See ``Kernels.adam``."""
        rough = rows.rough
        half = _at(rough.values, torch.bfloat16) if rough.values.dtype == torch.bfloat16 else None
        small = None if rough.scale is None else _at(rough.values, torch.int8)
        scale = None if rough.scale is None else _at(rough.scale)
        numbers = (rates.scale, rates.rate, rates.beta1, rates.beta2, rates.eps)
        tensors = (
            rows.b_enc, rows.W_dec, rows.g_enc, rows.g_bias, rows.g_dec,
            rows.m_enc, rows.v_enc, rows.m_bias, rows.v_bias, rows.m_dec, rows.v_dec,
        )  # fmt: skip
        self._c.saeguard_adam(
            *_widths(rows), _n(len(rows.active)), _at(rows.active, torch.uint8), _at(rows.clock, torch.int32),
            *map(ctypes.c_float, numbers), _at(rows.W_enc), half, small, scale, *map(_at, tensors),
        )  # fmt: skip


def _at(tensor: Tensor, dtype: torch.dtype = torch.float32) -> ctypes.c_void_p:
    """Where its elements lie. A wrong layout would be read as numbers: it is refused here, once for all."""
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"a kernel needs contiguous {dtype} on the CPU, got {tensor.dtype} {tuple(tensor.stride())}")
    return ctypes.c_void_p(tensor.data_ptr())


def _n(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


_KINDS = (torch.float32, torch.bfloat16, torch.int32)


def _pre(pre: Pre) -> tuple[object, ...]:
    if pre.values.dtype not in _KINDS:
        raise ValueError(f"pre-activations must be float32, bfloat16 or int32, got {pre.values.dtype}")
    scales = (None if one is None else _at(one) for one in (pre.of_row, pre.of_feature, pre.bias))
    return (_at(pre.values, pre.values.dtype), ctypes.c_int(_KINDS.index(pre.values.dtype)), *scales)


def _pairs(pairs: Pairs) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    return _at(pairs.starts, torch.int64), _at(pairs.feature, torch.int32)


def _widths(rows: FeatureRows) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return _n(rows.W_enc.shape[1]), _n(rows.W_dec.shape[1])


# What both kinds of kernels do.


class Kernels(Protocol):
    """B tokens, F features, n pairs, L levels. Nothing here is part of an autograd graph."""

    name: str

    def above(self, x: Tensor, W: Rough, bias: Tensor, cut: float) -> Pairs:
        """x [B, d], W [F, d], bias [F] -> pairs whose pre-activation is above ``cut``, which must not be negative."""
        ...

    def largest(self, x: Tensor, W: Rough, bias: Tensor, k: int) -> tuple[Pairs, Tensor]:
        """x [B, d], W [F, d], bias [F] -> each token's k largest pre-activations of those that are positive, of equal
        ones those that come first; and these [n], as roughly as W is."""
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

    def adam(self, rows: FeatureRows, rates: Rates) -> None:
        """Updates the active rows, decoder rows staying on the unit sphere; no row is active afterwards."""
        ...
