"""Which features fire on a batch: proposed by one dense product, decided by their values in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeguard_sae.train.kernels import FeatureRows, Kernels, Pairs, Pre, Rough
from saeguard_sae.train.settings import SaeSettings

_CHUNK = 512
"""Tokens whose pre-activations are looked at while they are in the cache."""
_MARGIN = 0.03
"""Below the last step's cut, as a share of it: what lies above that is proposed, and twice as much below as the cut
moved last. More costs values, less a second product now and then."""
_SPARE = 4
"""TopK proposes one more in so many: rounding may change the order of those near the last."""
_SAMPLE = 64


class Chosen(NamedTuple):
    """What fires."""

    pairs: Pairs
    values: Tensor
    """float32 [n]"""
    cut: Tensor
    """The smallest of them."""
    aux: Pairs | None
    """Dead features of the batch's first tokens; None where none is dead."""


class Proposer:
    """Keeps the last cut as a guess at the next."""

    def __init__(self, settings: SaeSettings, kernels: Kernels, rows: FeatureRows, d_in: int) -> None:
        self._settings, self._kernels, self._rows = settings, kernels, rows
        self._aux_k = settings.aux_k or max(1, d_in // 2)
        # Memory that is asked for anew for every product costs as much as a tenth of the product.
        is_small = rows.rough.scale is not None
        device = rows.W_enc.device
        self._room = torch.empty(_CHUNK, settings.d_sae, dtype=torch.int32, device=device) if is_small else None
        self.cut = torch.full((2,), -1.0, dtype=torch.float64)
        """The last two steps' cuts; below 0 while there is none. On the CPU: the kernels take them as numbers."""

    def choose(self, x: Tensor, dead: Tensor | None) -> Chosen:
        """x [B, d_in] as the encoder sees it; ``dead`` bool [F] where dead features should learn."""
        rough = self._rows.rough.like(x)
        index = None if dead is None else dead.nonzero().flatten()
        index = None if index is None or not len(index) else index
        if self._settings.architecture == "topk":
            pairs, aux = self._propose(rough, index, None)
            pairs, values = self._rank(x, pairs)
            smallest = values[values > 0].amin() if bool((values > 0).any()) else values.new_zeros(())
            return Chosen(pairs, values, smallest, aux)
        return self._choose_over_batch(x, rough, index)

    def _choose_over_batch(self, x: Tensor, rough: Rough, index: Tensor | None) -> Chosen:
        """The k * B largest of the batch, of those that are positive."""
        wanted = self._settings.k * len(x)
        guess = self._guess(rough)
        while True:
            pairs, aux = self._propose(rough, index, guess)
            values = self._kernels.read(x, self._rows.W_enc, self._rows.b_enc, pairs)
            if len(values) >= wanted or guess <= 0:
                break
            guess = guess * 0.7 if guess > 1e-6 else 0.0
        cut = _largest(values, wanted)
        self.cut[0] = self.cut[1]
        self.cut[1] = float(cut)
        mask = values >= cut
        return Chosen(pairs.keep(mask), values[mask], cut, aux)

    def _propose(self, rough: Rough, index: Tensor | None, guess: float | None) -> tuple[Pairs, Pairs | None]:
        """Those above the guess, or each token's largest where there is none; and the dead ones."""
        found, aux = [], []
        count = len(rough.values)
        revived = 0 if index is None else max(1, round(self._settings.aux_share * count))
        spare = self._settings.k + self._settings.k // _SPARE + 1
        for start in range(0, count, _CHUNK):
            pre = self._product(rough, start, start + _CHUNK)
            found.append(self._kernels.largest(pre, spare) if guess is None else self._kernels.above(pre, guess))
            if index is not None and start < revived:
                best = self._kernels.largest(pre.part(revived - start, index), min(self._aux_k, len(index)))
                aux.append(Pairs(best.starts, index[best.feature].int()))
        return Pairs.join(found), Pairs.join(aux) if aux else None

    def _product(self, rough: Rough, start: int, end: int) -> Pre:
        return self._rows.rough.product(rough, start, end, self._rows.b_enc, self._room)

    def _rank(self, x: Tensor, pairs: Pairs) -> tuple[Pairs, Tensor]:
        """Each token's k largest by their values."""
        values = self._kernels.read(x, self._rows.W_enc, self._rows.b_enc, pairs)
        row, at = pairs.rows(), torch.arange(len(values), device=x.device)
        table = values.new_full((len(x), int(pairs.starts.diff().max())), -1.0)
        table[row, at - pairs.starts[row]] = values
        k = min(self._settings.k, table.shape[1])
        best = table.topk(k, dim=1, sorted=False).indices
        kept = torch.zeros_like(table, dtype=torch.bool).scatter_(1, best, True)[row, at - pairs.starts[row]]
        return pairs.keep(kept), values[kept]

    def _guess(self, rough: Rough) -> float:
        """A little below what the cut will be; at first by that of a few tokens."""
        before, last = self.cut.tolist()
        if last < 0:
            pre = self._product(rough, 0, _SAMPLE).wide().float().relu().flatten()
            count = self._settings.k * min(_SAMPLE, len(rough.values))
            return pre.topk(count, sorted=False).values.min().item() * (1 - 4 * _MARGIN)
        moved: float = abs(last - before) / last if before >= 0 else 4 * _MARGIN
        return float(last * (1 - min(0.5, _MARGIN + 2 * moved)))


def _largest(values: Tensor, count: int) -> Tensor:
    """The count-th largest of values [n]; the smallest positive where there are fewer."""
    if len(values) >= count:
        return values.kthvalue(len(values) - count + 1).values.clamp_min(torch.finfo(values.dtype).tiny)
    return values.new_full((), torch.finfo(values.dtype).tiny)
