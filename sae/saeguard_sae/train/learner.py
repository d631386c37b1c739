"""A Matryoshka BatchTopK SAE while it learns (Bussmann et al. 2024, 2025), with AuxK (Gao et al. 2024).

Works on scaled activations, mean squared norm d_in; ``export`` folds the scale away and makes it a JumpReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saeguard_sae.activations import JumpReLU
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.train.settings import TrainSettings


class Learner(nn.Module):
    """Weights, the losses, and which features have been silent for how long."""

    silent: Tensor
    threshold: Tensor
    variance: Tensor

    def __init__(self, settings: TrainSettings, sample: Tensor) -> None:
        """``sample`` [tokens, d_in]: activations by which scale, bias and variance are set."""
        super().__init__()
        self.settings = settings
        d_in = sample.shape[1]
        self.scale = float((sample.square().sum(1).mean() / d_in).sqrt())
        sample = sample / self.scale
        rows = torch.randn(settings.d_sae, d_in, generator=torch.Generator().manual_seed(settings.seed))
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(settings.d_sae))
        self.b_dec = nn.Parameter(sample.mean(0))
        self.register_buffer("silent", torch.zeros(settings.d_sae, dtype=torch.long))
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("variance", (sample - sample.mean(0)).square().sum(1).mean())

    def loss(self, activations: Tensor, step: int, before: Tensor | None = None) -> Tensor:
        """activations [batch, d_in] -> scalar, in shares of variance: reconstruction of all levels, AuxK, smoothness.

        ``before`` [batch, d_in] are the activations one token earlier; needed for smoothness only.
        """
        x = activations / self.scale
        positive = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
        cut = batch_threshold(positive.detach(), self.settings.k)
        self._remember(cut, step)
        features = positive * (positive >= cut)
        loss, error = self._nested(features, x)
        self.silent = (self.silent + 1) * (features.detach() <= 0).all(0)
        loss = loss + self.settings.aux_weight * self._aux(positive, error.detach())
        if before is None:
            return loss
        return loss + self.settings.smooth_weight * self._change(positive, before / self.scale)

    def _nested(self, features: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the levels of the unexplained share of variance, and the last level's error [batch, d_in]."""
        error = x - self.b_dec
        total, start = torch.zeros(()), 0
        for width in self.settings.levels:
            error = error - features[:, start:width] @ self.W_dec[start:width]
            total = total + error.square().sum(1).mean()
            start = width
        return total / len(self.settings.levels) / self.variance, error

    def _aux(self, positive: Tensor, error: Tensor) -> Tensor:
        """How badly the d_in / 2 strongest dead features rebuild the error; 0 when none is dead."""
        dead = (self.silent > self.settings.dead_after_steps).nonzero().flatten()
        if self.settings.aux_weight == 0 or dead.numel() == 0:
            return torch.zeros(())
        values, index = positive[:, dead].topk(min(dead.numel(), max(1, error.shape[1] // 2)), dim=1)
        rebuilt = torch.zeros_like(positive[:, dead]).scatter(1, index, values) @ self.W_dec[dead]
        return (error - rebuilt).square().sum() / error.square().sum().clamp(min=1e-12)

    def _change(self, positive: Tensor, before: Tensor) -> Tensor:
        """Variance of the first level's change since the token before, over twice its variance: 1 for white noise.

        Of variances, not of energies: those could be had by features that never change and cancel each other.
        """
        width = self.settings.levels[0]
        now = positive[:, :width]
        earlier = ((before - self.b_dec) @ self.W_enc[:, :width] + self.b_enc[:width]).relu()
        change = (now - earlier).square().sum()
        return change / (2 * (now - now.mean(0)).square().sum()).clamp(min=1e-12)

    def _remember(self, cut: Tensor, step: int) -> None:
        """Running mean of the threshold, the first steps weighing alike so that a short run is not biased to 0."""
        memory = min(self.settings.threshold_memory, step / (step + 1))
        self.threshold = memory * self.threshold + (1 - memory) * cut

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Takes from the decoder's gradient what would only change its rows' lengths."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def normalise(self) -> None:
        """Decoder rows to length 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def export(self) -> Dictionary:
        """A JumpReLU dictionary of unscaled activations: ``s * f(x / s)`` with unit decoder rows."""
        threshold = (self.threshold * self.scale).expand(self.settings.d_sae).clone()
        return Dictionary(
            W_enc=self.W_enc.detach().clone(),
            b_enc=self.b_enc.detach() * self.scale,
            W_dec=self.W_dec.detach().clone(),
            b_dec=self.b_dec.detach() * self.scale,
            activation=JumpReLU(threshold),
        )


def batch_threshold(positive: Tensor, k: int) -> Tensor:
    """The smallest of the k * batch largest values of ``positive`` [batch, d_sae], above 0."""
    kept = positive.flatten().topk(k * positive.shape[0], sorted=False).values
    return kept.min().clamp(min=torch.finfo(positive.dtype).tiny)
