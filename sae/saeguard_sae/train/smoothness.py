"""The price of first-level features that change from token to token; after Temporal SAEs, Bhalla et al. 2025."""

from __future__ import annotations

import torch
from torch import Tensor

from saeguard_sae.train.kernels import FeatureRows
from saeguard_sae.train.settings import SaeSettings

_TINY = 1e-12


class Smoothness:
    """Adds its gradients to those of the first level's features, whose number is small."""

    def __init__(self, settings: SaeSettings) -> None:
        self._weight, self._width = settings.smooth_weight, settings.levels[0]

    def add(self, now: Tensor, earlier: Tensor, rows: FeatureRows) -> Tensor:
        """now and earlier [B, d], as the encoder sees them -> the weighted cost.

        What b_dec does through the encoder follows from the features' biases: see ``SparseLearner``.
        """
        first = slice(0, self._width)
        with torch.enable_grad():
            weight = rows.W_enc[first].detach().requires_grad_()
            bias = rows.b_enc[first].detach().requires_grad_()
            cost = self._weight * change(now @ weight.T + bias, earlier @ weight.T + bias)
        by_weight, by_bias = torch.autograd.grad(cost, (weight, bias))
        fresh = rows.active[first] == 0
        for gradient, more in ((rows.g_enc, by_weight), (rows.g_bias, by_bias), (rows.g_dec, None)):
            gradient[first][fresh] = 0
            if more is not None:
                gradient[first] += more
        rows.active[first] = 1
        return cost.detach()


def change(now: Tensor, earlier: Tensor) -> Tensor:
    """Pre-activations [B, n] of tokens and of those before them -> variance of the features' change over twice their
    variance: 1 for white noise.

    Of variances, not of energies: those could be had by features that never change and cancel each other.
    """
    now, earlier = now.relu(), earlier.relu()
    moved = (now - earlier).square().sum()
    return moved / (2 * (now - now.mean(0)).square().sum()).clamp(min=_TINY)
