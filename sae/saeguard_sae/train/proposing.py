"""Which features fire on a batch: proposed by one dense product, decided by their values in float32.

Several processes decide together, by the values of all: as one process would with the whole batch and all features.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from saeguard_sae.train.kernels import FeatureRows, Kernels, Pairs
from saeguard_sae.train.parallel.mesh import Mesh
from saeguard_sae.train.settings import SaeSettings

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

    def __init__(self, settings: SaeSettings, kernels: Kernels, rows: FeatureRows, d_in: int, mesh: Mesh) -> None:
        self._settings, self._kernels, self._rows, self._mesh = settings, kernels, rows, mesh
        self._aux_k = settings.aux_k or max(1, d_in // 2)
        self._spare = settings.k + settings.k // _SPARE + 1
        self.cut = torch.full((2,), -1.0, dtype=torch.float64)
        """The last two steps' cuts; below 0 while there is none. On the CPU: the kernels take them as numbers."""

    def choose(self, x: Tensor, dead: Tensor | None) -> Chosen:
        """x [B, d_in] as the encoder sees it; ``dead`` bool [d_sae] where dead features should learn."""
        aux = self._revive(x, dead) if dead is not None and bool(dead.any()) else None
        if self._settings.architecture != "topk":
            return self._choose_over_batch(x, aux)
        pairs = self._largest(x, slice(None), self._spare)
        values = self._read(x, pairs)
        kept = self._strongest(pairs, values, self._settings.k, self._spare)
        pairs, values = pairs.keep(kept), values[kept]
        smallest = self._mesh.least(torch.cat([values[values > 0], values.new_full((1,), inf)]).amin())
        return Chosen(pairs, values, smallest if smallest < inf else torch.zeros_like(smallest), aux)

    def _choose_over_batch(self, x: Tensor, aux: Pairs | None) -> Chosen:
        """The k * B largest of the batch, of those that are positive."""
        wanted = self._settings.k * len(x) * self._mesh.data
        guess = self._guess(x)
        while True:
            pairs = self._kernels.above(x, self._rows.rough, self._rows.b_enc, guess)
            values = self._read(x, pairs)
            every = self._mesh.gather(values)
            if len(every) >= wanted or guess <= 0:
                break
            guess = guess * 0.7 if guess > 1e-6 else 0.0
        cut = _largest(every, wanted)
        self.cut[0] = self.cut[1]
        self.cut[1] = float(cut)
        mask = values >= cut
        return Chosen(pairs.keep(mask), values[mask], cut, aux)

    def _revive(self, x: Tensor, dead: Tensor) -> Pairs:
        """The strongest of the dead features, on the batch's first tokens."""
        first = max(1, round(self._settings.aux_share * len(x) * self._mesh.data))
        here = x[: self._mesh.count(first)]
        index = dead[self._mesh.features(len(dead))].nonzero().flatten()
        if not len(here):
            return Pairs(torch.zeros(1, dtype=torch.int64, device=x.device), index[:0].int())
        best = self._largest(here, index, self._aux_k)
        return Pairs(best.starts, index[best.feature].int())

    def _largest(self, x: Tensor, features: slice | Tensor, k: int) -> Pairs:
        """Of these features each token's k largest, over all parts of the SAE."""
        W = self._rows.rough if isinstance(features, slice) else self._rows.rough.at(features)
        pairs, values = self._kernels.largest(x, W, self._rows.b_enc[features], k)
        return pairs if self._mesh.shards == 1 else pairs.keep(self._strongest(pairs, values, k, k))

    def _read(self, x: Tensor, pairs: Pairs) -> Tensor:
        return self._kernels.read(x, self._rows.W_enc, self._rows.b_enc, pairs)

    def _strongest(self, pairs: Pairs, values: Tensor, k: int, room: int) -> Tensor:
        """bool [n] whether a pair is among its token's k, over all parts of the SAE; of equal ones the lowest features.

        Args:
            room: pairs that a token has here, at most; the same in every process.
        """
        if self._mesh.shards == 1:
            return self._kernels.strongest(pairs, values, k)
        row = pairs.rows()
        column = torch.arange(len(values), device=values.device) - pairs.starts[row]
        table = values.new_full((len(pairs.starts) - 1, room), -1.0)
        table[row, column] = values
        every = self._mesh.all_features(table, dim=1)
        best = every.sort(dim=1, descending=True, stable=True).indices[:, :k]
        kept = torch.zeros_like(every, dtype=torch.bool).scatter_(1, best, True)
        return kept[row, self._mesh.shard * room + column]

    def _guess(self, x: Tensor) -> float:
        """A little below what the cut will be; at first by that of a few tokens."""
        before, last = self.cut.tolist()
        if last < 0:
            sample = min(max(_SAMPLE, self._mesh.data), len(x) * self._mesh.data)
            products = self._rows.rough.products(x[: self._mesh.count(sample)], self._rows.b_enc)
            here = next(products).wide().float().relu().flatten()
            most = here.topk(min(self._settings.k * sample, len(here)), sorted=False).values
            every = self._mesh.gather(most).topk(self._settings.k * sample, sorted=False).values
            return every.min().item() * (1 - 4 * _MARGIN)
        moved: float = abs(last - before) / last if before >= 0 else 4 * _MARGIN
        return float(last * (1 - min(0.5, _MARGIN + 2 * moved)))


def _largest(values: Tensor, count: int) -> Tensor:
    """The count-th largest of values [n]; the smallest positive where there are fewer."""
    if len(values) >= count:
        return values.kthvalue(len(values) - count + 1).values.clamp_min(torch.finfo(values.dtype).tiny)
    return values.new_full((), torch.finfo(values.dtype).tiny)
