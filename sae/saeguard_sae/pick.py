"""Picks features of many tokens: the largest, those above a threshold, named ones. The values are float32's own.

Only candidates are computed exactly. They come from upper bounds (``ceiling``): a feature that is not among them is
proven to lose, because the worst that was picked is at least the bound of the best that was not. For a token of which
that proves nothing more are computed, and in the end all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saeguard_sae.activations import Activation, TanhReLU
from saeguard_sae.ceiling import Bounds, Ceiling, number, ranked
from saeguard_sae.coder import SparseCoder, is_signed
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.largest import largest
from saeguard_sae.normalisation import normalise
from saeguard_sae.pursuit import MatchingPursuit
from saeguard_sae.selections import TopK
from saeguard_sae.temporal import Temporal

SPARE = 16
"""Candidates beyond those asked for; half as many again where more than twice this are asked for."""
SPARSE = 64
"""At most one feature in so many is computed as a candidate: past that the whole product is as fast."""
CELLS = 2**23
"""Bounds held at a time, in tokens times features."""


class Picked(NamedTuple):
    """[N, n] each: values in float32, whose they are (int64), and which are picked; rows are as long as the longest."""

    values: Tensor
    features: Tensor
    keep: Tensor


class Picker:
    """Picks features of one coder, token by token, on the device where its weights are.

    Args:
        fast: keep a bfloat16 copy of the encoder, made at the first use or by ``prepare``, where the coder and the
            hardware allow it. Without it every token is encoded whole.

    Raises:
        ValueError: a temporal SAE, which reads a token together with all before it.
    """

    def __init__(self, coder: SparseCoder, *, fast: bool = True) -> None:
        if isinstance(coder, Temporal):
            raise ValueError("a temporal SAE reads whole prefixes: encode them, then use top_of, above_of and named_of")
        self._coder, self._signed = coder, is_signed(coder)
        self._ceiling: Ceiling | None = None
        self._waits = fast and _is_bounded(coder)

    def prepare(self) -> bool:
        """Makes the copy now, if there is to be one; whether there is."""
        if self._waits:
            assert isinstance(self._coder, Dictionary)
            with torch.no_grad():
                self._ceiling, self._waits = Ceiling.of(self._coder), False
        return self._ceiling is not None

    @torch.no_grad()
    def top(self, x: Tensor, k: int) -> Picked:
        """x [N, d_in] -> the k features of largest size, largest first; those that are 0 are not kept.

        Fewer columns where fewer can be on. A GPU is waited for once per ``CELLS``, and again where tokens are left.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return _stacked([self._top(part, min(k, self._coder.d_sae)) for part in self._parts(x)])

    @torch.no_grad()
    def above(self, x: Tensor, threshold: float) -> Picked:
        """x [N, d_in] -> the features of size above the threshold, largest first."""
        return _stacked([self._above(part, threshold) for part in self._parts(x)])

    @torch.no_grad()
    def named(self, x: Tensor, features: Sequence[int]) -> Picked:
        """x [N, d_in] -> these features, in this order; all are kept."""
        return _stacked([self._named(part, features) for part in self._parts(x)])

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        return torch.split(x, max(1, CELLS // self._coder.d_sae))

    def _top(self, x: Tensor, k: int) -> Picked:
        coder = self._coder
        assert isinstance(coder, Dictionary | MatchingPursuit)
        n = k
        if isinstance(coder, Dictionary) and isinstance(coder.activation, TopK):
            n = min(k, coder.activation.k) if coder.activation.gain is None else coder.activation.k
        tries = self._tries(n)
        if not tries:
            return top_of(coder.encode(x).float(), k, signed=self._signed)
        assert isinstance(coder, Dictionary)
        assert self._ceiling is not None
        z = _centred(coder, x)
        values, index = self._best(z, self._ceiling(z), n, tries)
        return _finished(coder.activation, values, index, k)

    def _above(self, x: Tensor, threshold: float) -> Picked:
        coder = self._coder
        assert isinstance(coder, Dictionary | MatchingPursuit)
        if threshold < 0 or not self._pays(1):
            return above_of(coder.encode(x).float(), threshold, signed=self._signed)
        assert isinstance(coder, Dictionary)
        if isinstance(coder.activation, TopK):
            found = self._top(x, coder.activation.k)
            return found._replace(keep=found.values > threshold)
        assert self._ceiling is not None
        z = _centred(coder, x)
        bounds = self._ceiling.without_those_off(self._ceiling(z), threshold)
        most = int(_positive(bounds.pattern).max()) if len(x) else 0
        if not (bounds.holds.all() and self._pays(most)):
            return above_of(coder.encode(x).float(), threshold, signed=self._signed)
        limits, index = largest(bounds.pattern, most)
        values, order = _exact(coder, z, limits, index).sort(dim=-1, descending=True)
        found = _finished(coder.activation, values, index.gather(1, order), most)
        return found._replace(keep=found.values > threshold)

    def _named(self, x: Tensor, features: Sequence[int]) -> Picked:
        coder = self._coder
        assert isinstance(coder, Dictionary | MatchingPursuit)
        if not isinstance(coder, Dictionary) or not coder.activation.local:
            return named_of(coder.encode(x).float(), features)
        index = torch.tensor(features, device=x.device, dtype=torch.int64)
        pre = _centred(coder, x) @ coder.W_enc[:, index] + coder.b_enc[index]
        own = {name: one[index] for name, one in coder.activation.parameters().items()}
        values = coder.activation.with_parameters(own)(pre).float()
        index = index.expand_as(values)
        return Picked(values, index, torch.ones_like(index, dtype=torch.bool))

    def _best(self, z: Tensor, bounds: Bounds, n: int, tries: list[int]) -> tuple[Tensor, Tensor]:
        """The n largest of tokens z [N, d_in], in the units in which they are ranked, and their features, [N, n].

        From the first number of candidates; for tokens of which that proves nothing, from those that may be on alone
        and the next number; past the last, from all.
        """
        coder, ceiling = self._coder, self._ceiling
        assert isinstance(coder, Dictionary)
        assert ceiling is not None
        if not tries:
            return largest(ranked(coder.activation)(z @ coder.W_enc + coder.b_enc), n)
        limits, index = largest(bounds.pattern, tries[0] + 1)
        values, order = _exact(coder, z, limits[:, :-1], index[:, :-1]).topk(n, dim=-1)
        index = index.gather(1, order)
        proven = bounds.holds & (values[:, -1] >= number(limits[:, -1]))
        rows = proven.logical_not().nonzero()[:, 0]
        if len(rows):
            left = ceiling.without_those_off(Bounds(bounds.pattern[rows], bounds.holds[rows]))
            values[rows], index[rows] = self._best(z[rows], left, n, tries[1:])
        return values, index

    def _tries(self, n: int) -> list[int]:
        """How many candidates to look at for the n largest, one number after another."""
        first = n + _spare(n)
        growing = [first * 4**more for more in range(8) if self._pays(first * 4**more)]
        has_floor = self._ceiling is not None and self._ceiling.floor is not None
        # The second time only among features that may be on.
        return [first, *growing] if has_floor and growing else growing

    def _pays(self, candidates: int) -> bool:
        """Whether computing so many features alone is less work than all of them at once."""
        return self.prepare() and candidates * SPARSE <= self._coder.d_sae


def top_of(features: Tensor, k: int, *, signed: bool = False) -> Picked:
    """features [N, d_sae] -> as ``Picker.top``. Features that can be negative (``signed``) are sized by magnitude."""
    index = largest(features.abs() if signed else features, min(k, features.shape[1]))[1]
    values = features.gather(1, index)
    return Picked(values, index, values != 0)


def above_of(features: Tensor, threshold: float, *, signed: bool = False) -> Picked:
    """features [N, d_sae] -> as ``Picker.above``."""
    size = features.abs() if signed else features
    most = int((size > threshold).sum(dim=-1).max()) if len(features) else 0
    sizes, index = largest(size, most)
    return Picked(features.gather(1, index), index, sizes > threshold)


def named_of(features: Tensor, names: Sequence[int]) -> Picked:
    """features [N, d_sae] -> as ``Picker.named``."""
    index = torch.tensor(names, device=features.device, dtype=torch.int64).expand(len(features), -1)
    return Picked(features.gather(1, index), index, torch.ones_like(index, dtype=torch.bool))


def _is_bounded(coder: SparseCoder) -> bool:
    """Whether a larger pre-activation is never worth less, as long as the feature is on."""
    if not isinstance(coder, Dictionary):
        return False
    return coder.activation.local or (isinstance(coder.activation, TopK) and not coder.activation.keeps_negative)


def _centred(dictionary: Dictionary, x: Tensor) -> Tensor:
    """x [N, d_in] as it meets the encoder."""
    n = normalise(dictionary.normalisation, x.to(dictionary.W_enc.dtype))
    return n - dictionary.b_dec if dictionary.centre else n


def _exact(dictionary: Dictionary, z: Tensor, limits: Tensor, index: Tensor) -> Tensor:
    """The values of features ``index`` [N, n], in the units in which they are ranked; 0 where the bound says so."""
    # Past the last feature there are rows whose bound is 0.
    index = index.clamp_max(dictionary.d_sae - 1)
    pre = _dots(z, dictionary.W_enc.T, index) + dictionary.b_enc[index]
    activation = ranked(dictionary.activation)
    own = {name: one[index] for name, one in activation.parameters().items()}
    return torch.where(limits > 0, activation.with_parameters(own)(pre), 0.0)


def _dots(z: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """z [N, d], rows [m, d], index [N, n] -> ``z_i . rows[index_ij]`` [N, n], without gathering the rows."""
    count, width = index.shape
    starts = torch.arange(0, count * width, width, device=z.device) if width else index.new_zeros(count)
    token = torch.arange(count, device=z.device).repeat_interleave(width)
    flat = index.flatten()
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(z, rows, flat, starts, token, 0)
    return dots.view(count, width)


def _finished(activation: Activation, values: Tensor, index: Tensor, k: int) -> Picked:
    """Ranked candidates [N, n], largest first -> the k largest by what they are worth; 0 is not kept."""
    if isinstance(activation, TanhReLU):
        values = values.tanh()
    if isinstance(activation, TopK) and activation.gain is not None:
        values = values * activation.gain[index.clamp_max(len(activation.gain) - 1)]
        values, order = values.topk(min(k, values.shape[1]), dim=-1)
        index = index.gather(1, order)
    # Not a number is kept, as it is where everything is encoded.
    return Picked(values, index, (values <= 0).logical_not())


def _positive(pattern: Tensor) -> Tensor:
    """[N] how many bounds are above 0."""
    return pattern.clamp(0, 1).sum(dim=-1, dtype=torch.int32)


def _spare(n: int) -> int:
    return max(SPARE, n // 2)


def _stacked(parts: list[Picked]) -> Picked:
    """Parts of a batch below each other, the narrower ones padded with what is not kept."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.values.shape[1] for part in parts)
    columns = zip(*parts, strict=True)
    pad = torch.nn.functional.pad
    return Picked(*(torch.cat([pad(one, (0, width - one.shape[1])) for one in column]) for column in columns))
