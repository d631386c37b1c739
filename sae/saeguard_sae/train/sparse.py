"""SAEs that keep the largest pre-activations, while they learn: TopK, BatchTopK, Matryoshka BatchTopK, with AuxK.

One dense product proposes which features fire (in 8-bit integers unless told otherwise), and everything after it is
done for the pairs of token and feature that do: values in float32, reconstructions, exact gradients, Adam.

Several processes add up gradients, and parts of a reconstruction where each has a part of the features; what is decided
by them (what fires, the cut, who is dead, how far a step goes) is then the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saeguard_sae.activations import JumpReLU
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.selections import TopK
from saeguard_sae.train.kernels import FeatureRows, Kernels, Pairs, Rates, TorchKernels, choose
from saeguard_sae.train.parallel.gradients import add_up
from saeguard_sae.train.parallel.mesh import Mesh
from saeguard_sae.train.proposing import Proposer
from saeguard_sae.train.scaling import Scaling, unit_rows
from saeguard_sae.train.settings import SaeSettings
from saeguard_sae.train.smoothness import Smoothness
from saeguard_sae.train.tracking import Progress, Tracking

_TINY = 1e-12
_CUTS = 20
"""One in so many of a run's steps counts for the threshold, at most: the last ones."""


class SparseLearner:
    """See ``Learner``; made by ``make_learner``."""

    def __init__(self, settings: SaeSettings, sample: Tensor, target: Tensor | None, mesh: Mesh) -> None:
        self.settings, self.steps, self._mesh = settings, 0, mesh
        device = sample.device
        self.scaling = Scaling.of(sample, target)
        self.kernels = choose(settings.kernels, device)
        self._decoder: Kernels = self.kernels if mesh.shards == 1 else TorchKernels(mesh)
        here, count, d_in = mesh.features(settings.d_sae), settings.d_sae, sample.shape[1]
        W_dec = unit_rows(count, len(self.scaling.mean), settings.seed, device, here)
        is_tied = d_in == W_dec.shape[1]
        W_enc = W_dec.clone() if is_tied else unit_rows(count, d_in, settings.seed + 1, device, here)
        self.rows = FeatureRows.new(W_enc, W_dec, settings.precision)
        self.b_dec = self.scaling.mean.clone()
        self._moments = torch.zeros(2, len(self.b_dec), device=device)
        self.threshold = torch.zeros((), device=device)
        self.tracking = Tracking(settings, device)
        self._proposer = Proposer(settings, self.kernels, self.rows, d_in, mesh)
        # Counted from the first feature that is here: a level may end before it, or behind the last.
        ends = torch.tensor(settings.levels, dtype=torch.int32, device=device) - here.start
        self._ends = ends.clamp(0, len(W_dec))
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
        fired = self._mesh.all_features(self._mesh.any_row(self.rows.active.clone()), dim=0)
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

    def progress(self) -> Progress:
        """See ``Learner.progress``."""
        return self.tracking.progress(self.steps)

    def export(self) -> Dictionary:
        """See ``Learner.export``: JumpReLU by the running threshold; TopK stays what it is, but for transcoders, of
        which no format has it."""
        settings, rows, whole = self.settings, self.rows, self._mesh.whole
        is_topk = settings.architecture == "topk" and not settings.is_transcoder
        W_enc, b_enc, W_dec = whole(rows.W_enc), whole(rows.b_enc), whole(rows.W_dec)
        jump = JumpReLU(self.threshold.to(b_enc.device).expand(len(b_enc)).clone())
        activation = TopK(settings.k) if is_topk else jump
        b_dec, centre = self.b_dec.to(b_enc.device), not settings.is_transcoder
        return self.scaling.fold(W_enc, b_enc, W_dec, b_dec, activation, centre=centre)

    def state(self) -> dict[str, Tensor]:
        """See ``Learner.state``."""
        rows = {name: self._mesh.whole(tensor) for name, tensor in self.rows.state().items()}
        return {"steps": torch.tensor(self.steps)} | self._small_state() | self.scaling.state() | rows

    def align(self) -> None:
        """See ``Learner.align``."""
        for tensor in (self._small_state() | self.rows.state()).values():
            self._mesh.as_first(tensor)
        self.rows.rough.write(slice(None), self.rows.W_enc)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See ``Learner.load_state``."""
        self.scaling = Scaling.from_state(state, self.b_dec.device)
        self.steps = int(state["steps"])
        for name, tensor in self._small_state().items():
            tensor.copy_(state[name])
        here = self._mesh.features(self.settings.d_sae)
        self.rows.load_state({name: state[name][here] for name in self.rows.state()})

    def _small_state(self) -> dict[str, Tensor]:
        """What every process has all of."""
        own = {"b_dec": self.b_dec, "moments": self._moments, "threshold": self.threshold, "cut": self._proposer.cut}
        return own | self.tracking.state()

    def _remember(self, cut: Tensor) -> None:
        """Running mean of the cut, which moves while it learns: of few steps at first, and of few in a short run."""
        settings = self.settings
        memory = min(settings.threshold_memory, self.steps / (self.steps + 1), max(0.0, 1 - _CUTS / settings.steps))
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
        tokens = len(seen) * self._mesh.data
        count = tokens * self.scaling.variance
        levels = len(self._ends)
        weights = torch.full((levels,), 2 / (levels * count), device=seen.device)
        decoded = self._decoder.decode(wanted, self.rows.W_dec, pairs, values, self._ends, weights)
        self.kernels.gradients(seen, decoded, pairs, values, self._ends, self.rows)
        each = self._mesh.sum_rows(decoded.squares.sum(0)) / count
        l0 = self._mesh.sum((values > 0).sum()) / tokens
        return each.mean(), l0, each[-1], self._mesh.sum_rows(decoded.pulls[0].sum(0)), decoded.last

    def _revive(self, seen: Tensor, error: Tensor, pairs: Pairs) -> Tensor:
        """AuxK: how badly the strongest dead features rebuild the error, on the first of the batch's tokens."""
        rows = len(pairs.starts) - 1
        part, wanted = seen[:rows].contiguous(), -error[:rows]
        values = self.kernels.read(part, self.rows.W_enc, self.rows.b_enc, pairs)
        size = self._mesh.sum_rows(wanted.square().sum()).clamp_min(_TINY)
        whole = self._ends[-1:]
        weights = (2 * self.settings.aux_weight / size).reshape(1)
        decoded = self._decoder.decode(wanted, self.rows.W_dec, pairs, values, whole, weights)
        self.kernels.gradients(part, decoded, pairs, values, whole, self.rows)
        return self.settings.aux_weight * self._mesh.sum_rows(decoded.squares.sum()) / size

    def _update(self, bias: Tensor) -> None:
        """One step of Adam, its gradient no longer than ``clip``. ``bias`` [d_out]: b_dec's as what is written."""
        add_up(self.rows, self._mesh)
        self._attend_to_idle()
        if not self.settings.is_transcoder:
            through = torch.where(self.rows.active.bool(), self.rows.g_bias, 0.0)
            bias = bias - self._mesh.sum_features(through @ self.rows.W_enc)
        lengths = self._mesh.sum_features(self.kernels.lengths(self.rows).sum(dtype=torch.float64))
        squares = lengths + bias.square().sum()
        length = float(squares.sqrt())
        rates = Rates(self.settings.rate(self.steps), min(1.0, self.settings.clip / max(length, _TINY)))
        self.kernels.adam(self.rows, rates)
        self._move_bias(bias * rates.scale, rates)

    def _attend_to_idle(self) -> None:
        """Live features without a gradient get one of 0: Adam that waits for the next one moves rare features too
        little. Dead ones cost nothing, but begin anew now and then; not those that AuxK teaches: it needs time."""
        dead = self.tracking.dead()[self._mesh.features(self.settings.d_sae)]
        is_idle = ~self.rows.active.bool()
        if self._is_restart_due():
            self.rows.restart(dead & is_idle, self.settings.restart_scale)
        waiting = (is_idle & ~dead).nonzero().flatten()
        for gradient in (self.rows.g_enc, self.rows.g_bias, self.rows.g_dec):
            gradient.index_fill_(0, waiting, 0.0)
        self.rows.active.index_fill_(0, waiting, 1)

    def _move_bias(self, gradient: Tensor, rates: Rates) -> None:
        mean, square = self._moments
        mean.lerp_(gradient, 1 - rates.beta1)
        square.lerp_(gradient.square(), 1 - rates.beta2)
        time = self.steps + 1
        root = (square / (1 - rates.beta2**time)).sqrt() + rates.eps
        self.b_dec.sub_(rates.rate / (1 - rates.beta1**time) * mean / root)
