"""The metrics of an SAE, as sums over tokens that come part by part: memory does not grow with them.

A feature fires on a token where it is not 0. L0 is the number of features that fire, the density of a feature the share
of tokens on which it does; a dead one never did. FVU, the fraction of variance unexplained (1 - explained variance), is
squared errors by squared deviations from the mean, sums over all tokens and not a mean of ratios. Cross-entropy
recovered is the share of what an ablation costs that the reconstruction does not (Bricken et al. 2023; Gated SAEs,
Rajamanoharan et al. 2024); like SAEBench, for mean and for zero ablation.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor
from torch.nn import functional

_POSITIONS = 128  # whose log-probabilities are held at once: vocabularies go up to hundreds of thousands
_NO_COST = 1e-9  # nats: an ablation that costs less says nothing about what is recovered of it


def fires(features: Tensor) -> Tensor:
    return features != 0


class SaeMetrics:
    def __init__(self, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.by_l0 = torch.zeros(d_sae + 1, dtype=torch.long, device=device)
        """[d_sae + 1] tokens on which so many features fired."""
        self.fired = torch.zeros(d_sae, dtype=torch.long, device=device)  # [d_sae] tokens on which each feature fired
        self._error = 0.0
        self._variance = _Variance()
        self._directed = torch.zeros(3, dtype=torch.float64, device=device)
        """Of tokens whose target is not 0: cosines, norm ratios, and their number."""

    def count(self, features: Tensor) -> None:
        """features [n, d_sae] of n more tokens."""
        is_firing = fires(features)
        self.tokens += len(features)
        self.by_l0 += torch.bincount(is_firing.sum(1), minlength=len(self.by_l0)).to(self.by_l0.device)
        self.fired += is_firing.sum(0).to(self.fired.device)

    def compare(self, reconstruction: Tensor, target: Tensor) -> None:
        """Both [n, width] in float32."""
        self._error += float((reconstruction - target).square().sum())
        self._variance.add(target)
        length, target_length = reconstruction.norm(dim=1).double(), target.norm(dim=1).double()
        dot = (reconstruction.double() * target).sum(1)
        is_directed = target_length > 0  # a token of zeros has neither a direction nor a ratio
        cosines = (dot / (length * target_length).clamp(min=1e-30))[is_directed]
        ratios = (length / target_length.clamp(min=1e-30))[is_directed]
        sums = torch.stack([cosines.sum(), ratios.sum(), is_directed.sum().double()])
        self._directed += sums.to(self._directed.device)

    @property
    def l0(self) -> float:
        return float(self.fired.sum()) / self.tokens

    @property
    def fvu(self) -> float:
        if self._variance.squares:
            return self._error / self._variance.squares
        return inf if self._error else 0.0

    @property
    def cosine(self) -> float:
        """Between a token's reconstruction and its target, mean; 0 for a reconstruction of zeros."""
        return float(self._directed[0] / self._directed[2].clamp(min=1))

    @property
    def norm_ratio(self) -> float:
        """Length of a token's reconstruction by that of its target, mean; below 1 is shrinkage."""
        return float(self._directed[1] / self._directed[2].clamp(min=1))

    @property
    def dead_share(self) -> float:
        return float((self.fired == 0).double().mean())

    @property
    def density(self) -> Tensor:
        """[d_sae] share of tokens on which each feature fired, float64."""
        return self.fired.double().cpu() / self.tokens


class _Variance:
    """Squared deviations from the mean of tokens that come in chunks (Chan, Golub and LeVeque 1979).

    The shorter way over the sum of squares cancels where the mean is long, as in a residual stream.
    """

    def __init__(self) -> None:
        self.squares = 0.0
        self._tokens = 0
        self._mean: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        mean = x.mean(dim=0)
        self.squares += float((x - mean).square().sum())
        ahead = mean.cpu().double() - self._mean
        total = self._tokens + len(x)
        self.squares += float(ahead.square().sum()) * self._tokens * len(x) / total
        self._mean = self._mean + ahead * (len(x) / total)
        self._tokens = total


class NextTokenLoss:
    """Means over positions whose next token counts, in nats: of the model as it is, spliced or ablated."""

    def __init__(self) -> None:
        self._nats = 0.0
        self._divergence = 0.0
        self.positions = 0

    @property
    def cross_entropy(self) -> float:
        return self._nats / self.positions

    @property
    def divergence(self) -> float:
        """KL(changed || base): how surprising what the changed model would say is to the model as it is."""
        return self._divergence / self.positions

    def add(self, logits: Tensor, ids: Tensor, predicted: Tensor, base: Tensor | None = None) -> None:
        """logits of the changed model, and ``base`` of the model as it is, [rows, T, vocabulary]; ids [rows, T];
        ``predicted`` bool [rows, T - 1]: positions whose next token counts."""
        following = ids[:, 1:][predicted]
        row, position = predicted.nonzero(as_tuple=True)
        self.positions += len(following)
        for part in torch.split(torch.arange(len(following), device=logits.device), _POSITIONS):
            scores = logits[row[part], position[part]].float().log_softmax(-1)
            self._nats += float(functional.nll_loss(scores, following[part], reduction="sum"))
            if base is not None:
                before = base[row[part], position[part]].float().log_softmax(-1)
                self._divergence += float((scores.exp() * (scores - before)).sum(dtype=torch.float64))


def recovered(changed: float, base: float, ablated: float) -> float | None:
    """The share of what ablation costs that the change does not; None where ablation costs nothing."""
    return None if ablated - base < _NO_COST else (ablated - changed) / (ablated - base)
