"""SAEs that keep the largest pre-activations, while they learn: TopK, BatchTopK, Matryoshka BatchTopK, with AuxK.

One dense product proposes which features fire (in 8-bit integers unless told otherwise), and everything after it is
done for the pairs of token and feature that do: values in float32, reconstructions, exact gradients, Adam.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saeguard_sae.activations import JumpReLU
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.selections import TopK
from saeguard_sae.train.kernels import FeatureRows, Pairs, Rates, choose
from saeguard_sae.train.proposing import Proposer
from saeguard_sae.train.scaling import Scaling, unit_rows
from saeguard_sae.train.settings import SaeSettings
from saeguard_sae.train.smoothness import Smoothness
from saeguard_sae.train.tracking import Progress, Tracking

_TINY = 1e-12


class SparseLearner:
    """See ``Learner``; made by ``make_learner``."""

    def __init__(self, settings: SaeSettings, sample: Tensor, target: Tensor | None) -> None:
        self.settings, self.steps = settings, 0
        device = sample.device
        self.scaling = Scaling.of(sample, target)
        self.kernels = choose(settings.kernels, device)
        W_dec = unit_rows(settings.d_sae, len(self.scaling.mean), settings.seed, device)
        is_tied = sample.shape[1] == W_dec.shape[1]
        W_enc = W_dec.clone() if is_tied else unit_rows(settings.d_sae, sample.shape[1], settings.seed + 1, device)
        self.rows = FeatureRows.new(W_enc, W_dec, settings.precision)
        self.b_dec = self.scaling.mean.clone()
        self._moments = torch.zeros(2, len(self.b_dec), device=device)
        self.threshold = torch.zeros((), device=device)
        self.tracking = Tracking(settings, device)
        self._proposer = Proposer(settings, self.kernels, self.rows, sample.shape[1])
        self._ends = torch.tensor(settings.levels, dtype=torch.int32, device=device)
        self._smooth = Smoothness(settings) if settings.smooth_weight else None

    @torch.no_grad()
    def step(self, x: Tensor, target: Tensor | None = None, before: Tensor | None = None) -> None:
        """See ``Learner.step``."""
        if (target is not None) != self.settings.is_transcoder:
            raise ValueError("a transcoder needs a target, and nothing else has one")
        seen = x / self.scaling.read if target is not None else x / self.scaling.read - self.b_dec
        wanted = seen if target is None else target / self.scaling.written - self.b_dec
        chosen = self._proposer.choose(seen, self.tracking.dead() if self.settings.aux_weight else None)
        self._remember(chosen.cut)
        loss, l0, fvu, bias, last = self._reconstruct(seen, wanted, chosen.pairs, chosen.values)
        fired = self.rows.active.clone()
        if chosen.aux is not None:
            loss = loss + self._revive(seen, last, chosen.aux)
        if self._smooth is not None:
            if before is None:
                raise ValueError("smooth_weight needs to know each token's predecessor")
            earlier = before / self.scaling.read - self.b_dec
            loss = loss + self._smooth.add(seen, earlier, self.rows)
        self._update(bias)
        self.tracking.note(fired, loss, l0, fvu)
        self.steps += 1
        if self._is_restart_due():
            self.rows.restart(self.tracking.dead(), self.settings.restart_scale)

    def progress(self) -> Progress:
        """See ``Learner.progress``."""
        return self.tracking.progress(self.steps)

    def export(self) -> Dictionary:
        """See ``Learner.export``: JumpReLU by the running threshold; TopK stays what it is, but for transcoders, of
        which no format has it."""
        settings = self.settings
        is_topk = settings.architecture == "topk" and not settings.is_transcoder
        jump = JumpReLU(self.threshold.expand(settings.d_sae).clone())
        activation = TopK(settings.k) if is_topk else jump
        rows, centre = self.rows, not self.settings.is_transcoder
        return self.scaling.fold(rows.W_enc, rows.b_enc, rows.W_dec, self.b_dec, activation, centre=centre)

    def state(self) -> dict[str, Tensor]:
        """See ``Learner.state``."""
        own = {"b_dec": self.b_dec, "moments": self._moments, "threshold": self.threshold, "cut": self._proposer.cut}
        own["steps"] = torch.tensor(self.steps)
        return own | self.scaling.state() | self.tracking.state() | self.rows.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See ``Learner.load_state``."""
        self.scaling = Scaling.from_state(state, self.b_dec.device)
        self.steps = int(state["steps"])
        for name in ("b_dec", "moments", "threshold", "cut", *self.tracking.state()):
            self.state()[name].copy_(state[name])
        self.rows.load_state(dict(state))

    def _remember(self, cut: Tensor) -> None:
        """Running mean of the cut, the first steps weighing alike so that a short run is not biased to 0."""
        memory = min(self.settings.threshold_memory, self.steps / (self.steps + 1))
        self.threshold.mul_(memory).add_((1 - memory) * cut)

    def _is_restart_due(self) -> bool:
        settings = self.settings
        is_early = self.steps < (1 - settings.decay) * settings.steps
        is_tied = self.rows.W_enc.shape == self.rows.W_dec.shape
        return settings.restart_scale > 0 and is_tied and is_early and self.steps % (2 * settings.dead_after_steps) == 0

    def _reconstruct(
        self, seen: Tensor, wanted: Tensor, pairs: Pairs, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Mean over the levels of the unexplained share of variance, L0, FVU; b_dec's gradient; the last error."""
        count = len(seen) * self.scaling.variance
        levels = len(self._ends)
        weights = torch.full((levels,), 2 / (levels * count), device=seen.device)
        decoded = self.kernels.decode(wanted, self.rows.W_dec, pairs, values, self._ends, weights)
        self.kernels.gradients(seen, decoded, pairs, values, self._ends, self.rows)
        each = decoded.squares.sum(0) / count
        l0 = (values > 0).sum() / len(seen)
        return each.mean(), l0, each[-1], decoded.pulls[0].sum(0), decoded.last

    def _revive(self, seen: Tensor, error: Tensor, pairs: Pairs) -> Tensor:
        """AuxK: how badly the strongest dead features rebuild the error, on the first of the batch's tokens."""
        rows = len(pairs.starts) - 1
        part, wanted = seen[:rows].contiguous(), -error[:rows]
        values = self.kernels.read(part, self.rows.W_enc, self.rows.b_enc, pairs)
        size = wanted.square().sum().clamp_min(_TINY)
        whole = self._ends[-1:]
        weights = (2 * self.settings.aux_weight / size).reshape(1)
        decoded = self.kernels.decode(wanted, self.rows.W_dec, pairs, values, whole, weights)
        self.kernels.gradients(part, decoded, pairs, values, whole, self.rows)
        return self.settings.aux_weight * decoded.squares.sum() / size

    def _update(self, bias: Tensor) -> None:
        """One step of Adam, its gradient no longer than ``clip``. ``bias`` [d_out]: b_dec's as what is written."""
        if not self.settings.is_transcoder:
            through = torch.where(self.rows.active.bool(), self.rows.g_bias, 0.0)
            bias = bias - through @ self.rows.W_enc
        squares = self.kernels.lengths(self.rows).sum(dtype=torch.float64) + bias.square().sum()
        length = float(squares.sqrt())
        rates = Rates(self.settings.rate(self.steps), min(1.0, self.settings.clip / max(length, _TINY)))
        self.kernels.adam(self.rows, rates)
        self._move_bias(bias * rates.scale, rates)

    def _move_bias(self, gradient: Tensor, rates: Rates) -> None:
        mean, square = self._moments
        mean.lerp_(gradient, 1 - rates.beta1)
        square.lerp_(gradient.square(), 1 - rates.beta2)
        time = self.steps + 1
        root = (square / (1 - rates.beta2**time)).sqrt() + rates.eps
        self.b_dec.sub_(rates.rate / (1 - rates.beta1**time) * mean / root)
