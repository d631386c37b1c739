"""Which features of a competing activation are let through, without encoding more than that takes. All of it exact.

A feature of TopK is on when fewer than k others score above it. Three shortcuts: a value of 0 needs no rank (a negative
pre-activation under ReLU); the dictionary is encoded in blocks and a token is done when k others are above each of its
features; GroupMax compares within its group alone. Ties at the k-th place count as let through, where ``torch.topk``
takes one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saeguard_sae.dictionary import (
    ActivationFunction,
    Columns,
    CompetingActivation,
    Dictionary,
    GroupMax,
    ReLU,
    TanhReLU,
    TopK,
    normalise,
)

FIRST, BLOCK = 512, 4096
"""Features encoded between two looks at which tokens are done: few at first, which most tokens need no more than, then
twice as many each time up to so many."""


@dataclass(frozen=True, slots=True, eq=False)
class Competitors:
    """Those that the features of a dictionary compete with: all of it, or only the groups of ``features``."""

    dictionary: Dictionary
    selection: CompetingActivation
    W_enc: Tensor
    bias: Tensor  # [n] with the centring folded in
    first: Tensor  # int64 [groups]: where a group's rows begin; -1 for groups that are not there

    @classmethod
    def of(cls, dictionary: Dictionary, features: Iterable[int]) -> Competitors:
        """Groups' rows are copied; everything else is a view."""
        selection = dictionary.activation
        assert isinstance(selection, CompetingActivation), "only competing features have competitors"
        first = torch.full((selection.groups,), -1, dtype=torch.int64, device=dictionary.W_enc.device)
        if not isinstance(selection, GroupMax):
            first[:] = 0
            return cls(dictionary, selection, dictionary.W_enc, dictionary.centred_bias(), first)
        size = dictionary.d_sae // selection.groups
        groups = torch.tensor(sorted({feature // size for feature in features}), device=first.device)
        first[groups] = torch.arange(len(groups), device=first.device) * size
        rows = (groups[:, None] * size + torch.arange(size, device=first.device)).flatten()
        W_enc, bias = dictionary.W_enc.T[rows].T.float(), dictionary.b_enc[rows].float()
        bias = bias - dictionary.b_dec.float() @ W_enc if dictionary.centre else bias
        return cls(dictionary, selection, W_enc, bias, first)

    def read(self, x: Tensor, features: Tensor, pre: Tensor) -> Tensor:
        """The values of features [N, E] of tokens x [N, d_in] in float32, given their pre-activations ``pre`` [N, E].

        A cell that is not of this dictionary has feature -1 and ``pre`` 0; its value is 0.
        """
        worth = self.selection.value(pre)
        undecided = worth != 0
        # Gathering only the tokens that need it would make a GPU wait for the host.
        if x.device.type == "cpu":
            rows = undecided.any(dim=-1).nonzero().squeeze(1)
            if not len(rows):
                return torch.zeros_like(worth)
            on = torch.zeros_like(undecided)
            on[rows] = self._on(x[rows], features[rows], pre[rows], undecided[rows])
        else:
            on = self._on(x, features, pre, undecided)
        gain = self.selection.parameters().get("gain")
        return torch.where(on, worth if gain is None else worth * gain[features], 0.0)

    def _on(self, x: Tensor, features: Tensor, pre: Tensor, undecided: Tensor) -> Tensor:
        n = normalise(self.dictionary.normalisation, x)
        score = self.selection.score(pre)
        if isinstance(self.selection, GroupMax):
            return undecided & self._leads(n, features, score)
        return undecided & self._ranks(n, features, score, undecided)

    def _leads(self, n: Tensor, features: Tensor, score: Tensor) -> Tensor:
        size = self.dictionary.d_sae // self.selection.groups
        every = self.selection.score(n @ self.W_enc.float() + self.bias)
        at = self.first[features // size] + features % size
        every = _with_own(every, torch.where(features < 0, -1, at), score, slice(0, every.shape[1]))
        best = every.view(len(every), -1, size).amax(dim=-1)
        return score >= best.gather(1, torch.where(features < 0, 0, at // size))

    def _ranks(self, n: Tensor, features: Tensor, score: Tensor, undecided: Tensor) -> Tensor:
        """Whether each feature is among the ``limit`` largest: its token's k-th score so far is never above it."""
        alive = undecided.clone()
        best = score.new_full((len(n), self.selection.limit), -torch.inf)
        rows = torch.arange(len(n), device=n.device)
        for part in self._blocks():
            every = self.selection.score(n[rows] @ self.W_enc[:, part].float() + self.bias[part])
            every = _with_own(every, features[rows], score[rows], part)
            best[rows] = torch.cat([best[rows], every], dim=1).topk(self.selection.limit, dim=1).values
            alive[rows] &= score[rows] >= best[rows, -1:]
            if n.device.type == "cpu":
                rows = alive.any(dim=-1).nonzero().squeeze(1)
                if not len(rows):
                    break
        return alive

    def _blocks(self) -> Iterator[slice]:
        start, size, end = 0, min(FIRST, BLOCK), self.W_enc.shape[1]
        while start < end:
            yield slice(start, min(start + size, end))
            start, size = start + size, min(2 * size, BLOCK)


def _with_own(every: Tensor, features: Tensor, score: Tensor, part: slice) -> Tensor:
    """The block's scores with those that were computed alone in their place: one product rounds unlike many, and a
    feature must not lose to itself."""
    inside = (features >= part.start) & (features < part.stop)
    # A spare column takes the cells outside the block.
    at = torch.where(inside, features - part.start, every.shape[1])
    return torch.cat([every, every[:, :1]], dim=1).scatter(1, at, score)[:, :-1]


# Upper bounds of every pre-activation of many tokens, by one bfloat16 product: what is below one need not be
# computed.
# Let a token z and a feature's row w be z' and w' in bfloat16. By Cauchy-Schwarz,
# ``z . w <= z' . w' + |z' - z| |w'| + |z| |w' - w|``.
# The last two terms and the bias are columns of the same product, each rounded up, so that the product is the bound
# itself. Summing in float32 can add ``d_in`` roundings; the bound has room for four times as many, which also covers
# those of the float32 product that it stands in for.

EXTRA = 8  # columns beside the input's own: two error terms, the bias in two parts, and zeros that keep rows aligned
_PADDED = 64  # the number of rows is a multiple of this, so that it divides into blocks
_BLOCK = 4096  # features rounded at a time while the rows are made
_ROUGH, _TINY, _HUGE = 2.0**-10, 2.0**-50, 2.0**60
"""Room for the rounding of a norm, for what underflows in it, and the size past which sums might overflow."""


class FeatureBounds(NamedTuple):
    """``pattern`` int16 [N, rows]: bfloat16 bit patterns of numbers >= 0, which sort as the numbers do; 0 or less for
    what is certainly off, and past the last feature. ``holds`` bool [N]: False for tokens too large or not finite.
    """

    pattern: Tensor
    holds: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class UpperBound:
    """The rounded encoder of one dictionary: half the memory that ``W_enc`` takes in float32."""

    rows: Tensor  # bfloat16 [d_sae padded, d_in + EXTRA]; on a CPU in oneDNN's own layout
    floor: Tensor | None
    """float32 [d_sae padded]: a feature whose bound is below it is off; None where that is 0 for all."""

    @classmethod
    def of(cls, dictionary: Dictionary) -> UpperBound | None:
        """None where it would not pay or not hold: no bfloat16 arithmetic, other than float32 weights, huge weights."""
        W_enc = dictionary.W_enc
        if W_enc.dtype != torch.float32 or not has_bfloat16(W_enc.device):
            return None
        scalars = rank_upper_bounds(dictionary.activation).columns(dictionary.b_enc)
        size = -(-dictionary.d_sae // _PADDED) * _PADDED
        rows = W_enc.new_zeros(size, dictionary.d_in + EXTRA, dtype=torch.bfloat16)
        largest = scalars.bias.abs().max()
        for start in range(0, dictionary.d_sae, _BLOCK):
            part = slice(start, start + _BLOCK)
            w = W_enc.T[part] * scalars.gain[part, None]
            largest = torch.maximum(largest, w.norm(dim=1).max())
            rows[start : start + len(w)] = _rounded(w, scalars.bias[part])
        if not largest < _HUGE:
            return None
        packed = torch.ops.mkldnn._reorder_linear_weight(rows, _PADDED) if rows.device.type == "cpu" else rows
        return cls(packed, _floor(scalars, size))

    def __call__(self, z: Tensor) -> FeatureBounds:
        """z [N, d_in] float32, as it meets the encoder -> bounds of every pre-activation; 0 where it is negative."""
        near = z.bfloat16()
        norm = z.norm(dim=1, keepdim=True)
        errors = [(near.float() - z).norm(dim=1, keepdim=True), norm]
        columns = [_up(error * (1 + _ROUGH) + _TINY) for error in errors]
        ones = near.new_ones(len(near), 2)
        zeros = near.new_zeros(len(near), EXTRA - 4)
        product = self._product(torch.cat([near, *columns, ones, zeros], dim=1))
        return FeatureBounds(product.view(torch.int16), norm[:, 0] <= _HUGE)

    def without_those_off(self, bounds: FeatureBounds, above: float = 0.0) -> FeatureBounds:
        """The same, with 0 for each feature that is off, or cannot exceed ``above``, whatever its exact value."""
        if self.floor is None and above <= 0:
            return bounds
        pattern = bounds.pattern
        floor = pattern.new_zeros(pattern.shape[1], dtype=torch.float32) if self.floor is None else self.floor
        # The bound was rounded to bfloat16 after it was summed: so is the floor, and further down.
        least = (floor.clamp_min(above) * (1 - 2**-6)).bfloat16().view(torch.int16)
        # All ones where the pattern reaches it: comparing and selecting take ten times as long on a CPU.
        return bounds._replace(pattern=(least - 1 - pattern).clamp_(-1, 0).bitwise_and_(pattern))

    def _product(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            bounds: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.rows, None, "relu", [], "")
            return bounds
        # Summed and returned in float32: partial sums in bfloat16 would break the bound.
        wide: Tensor = torch.ops.aten.mm.dtype(x, self.rows.T, torch.float32)
        return wide.relu_().bfloat16()


def checked_number(pattern: Tensor) -> Tensor:
    """A bound as float32, with the room that its last rounding to bfloat16 needs."""
    return pattern.view(torch.bfloat16).float() * (1 + 2**-8 + 2**-14)


def rank_upper_bounds(activation: ActivationFunction) -> ActivationFunction:
    """What orders the features that an activation lets through: the activation, without what keeps their order."""
    return ReLU() if isinstance(activation, TanhReLU | TopK) else activation


def has_bfloat16(device: torch.device) -> bool:
    """Whether its bfloat16 products are of its own making and accumulated in float32."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return fast and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch.ops.aten.mm, "dtype"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _floor(scalars: Columns, size: int) -> Tensor | None:
    """[d_sae padded to size] what ``gain * q + bias`` must exceed for ``q + gate`` to exceed the threshold."""
    gate = scalars.gain * scalars.gate
    # Less by how much these terms can lose to each other in float32.
    lost = (gate.abs() + scalars.bias.abs()) * 2**-20
    floor = (scalars.gain * scalars.threshold - gate + scalars.bias - lost).clamp_min(0)
    return pad(floor, (0, size - len(floor))) if floor.any() else None


def _rounded(w: Tensor, bias: Tensor) -> Tensor:
    near = w.bfloat16()
    size, lost = near.float().norm(dim=1), (near.float() - w).norm(dim=1)
    room = (w.shape[1] + EXTRA) * 2.0**-22
    high = bias.bfloat16()
    rest = bias - high.float() + room * bias.abs() + 2.0**-100
    first, second = size * (1 + _ROUGH) + _TINY, lost * (1 + _ROUGH) + room * (size + lost) + _TINY
    columns = torch.stack([_up(first), _up(second), high, _up(rest)], dim=1)
    return torch.cat([near, pad(columns, (0, EXTRA - 4))], dim=1)


def _up(value: Tensor) -> Tensor:
    """float32 -> bfloat16, never below it."""
    return (value + value.abs() * 2**-7).bfloat16()
