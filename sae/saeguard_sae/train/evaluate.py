"""How well an SAE stands in for the activations it was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard_sae.dictionary import Dictionary


@dataclass(frozen=True, slots=True)
class Fit:
    """Measured on activations that the SAE was not trained on."""

    l0: float
    """Features that fire on a token, mean."""
    fvu: float
    """Share of variance left unexplained: sums over all tokens, not a mean of ratios."""
    dead_share: float
    """Share of features that fired on none of the tokens."""
    tokens: int


@torch.no_grad()
def evaluate(dictionary: Dictionary, activations: Tensor, chunk: int = 8192) -> Fit:
    """activations [tokens, d_in] -> L0, FVU and the share of dead features."""
    fired = torch.zeros(dictionary.d_sae, dtype=torch.long)
    error = 0.0
    for x in torch.split(activations, chunk):
        features = dictionary.encode(x)
        fired += (features > 0).sum(0)
        error += float((dictionary.decode(features) - x).square().sum())
    variance = float((activations - activations.mean(0)).square().sum())
    tokens = activations.shape[0]
    return Fit(float(fired.sum()) / tokens, error / variance, float((fired == 0).float().mean()), tokens)
