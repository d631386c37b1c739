"""Activations whose features are known: sparse mixtures of directions that we drew, and how well an SAE found those.

Two worlds. ``toy`` is small superposition: independent features, some frequent and most rare. ``nested`` follows the
specification of SynthSAEBench (Chanin and Garriga-Alonso 2026, arXiv:2602.14687) at a sixteenth of its size: features
that fire only below their parent, of which siblings exclude each other, and whose firing is correlated.

A truth's seeds must never be a trainer's: an SAE that starts from the truth has nothing to find.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SEEDS = 700_000
"""Seeds of truths and of their samples are counted from here; trainers count from 0."""
CHILDREN = 4
DEPTH = 3


@dataclass(frozen=True)
class Truth:
    """Features as directions [features, d_in] of length 1, how often each fires and how strongly.

    Attributes:
        probability: [features], before ``roots`` take effect.
        mean: [features], strength when firing; with ``spread`` [features] a normal distribution, cut at ``least``.
        factor: [features, rank] of a Gaussian copula; None: features fire independently.
        roots: the first features; their trees lie behind them, a level after the other. 0: no feature has a parent.
    """

    directions: Tensor
    probability: Tensor
    mean: Tensor
    spread: Tensor
    least: float
    factor: Tensor | None = None
    roots: int = 0

    def sample(self, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Activations [tokens, d_in] and what each feature contributes to them [tokens, features]."""
        generator = torch.Generator().manual_seed(SEEDS + seed)
        fires = self._fires(tokens, generator)
        noise = torch.randn(fires.shape, generator=generator)
        strength = (self.mean + self.spread * noise).clamp(min=self.least) * fires
        strength *= self._allowed(strength > 0, generator)
        return strength @ self.directions, strength

    def _fires(self, tokens: int, generator: torch.Generator) -> Tensor:
        shape = (tokens, len(self.probability))
        if self.factor is None:
            return torch.rand(shape, generator=generator) < self.probability
        shared = torch.randn((tokens, self.factor.shape[1]), generator=generator) @ self.factor.T
        own = (1 - self.factor.square().sum(1)).sqrt() * torch.randn(shape, generator=generator)
        return shared + own > math.sqrt(2) * torch.erfinv(1 - 2 * self.probability)

    def _allowed(self, fires: Tensor, generator: torch.Generator) -> Tensor:
        """fires [tokens, features], without those whose parent does not, and one child of a parent, drawn, at most."""
        fires = fires.clone()
        for start, width in levels(self.roots):
            parents = fires[:, start : start + width]
            children = fires[:, start + width : start + width * (1 + CHILDREN)].unflatten(1, (width, CHILDREN))
            children &= parents[:, :, None]
            drawn = torch.rand(children.shape, generator=generator).masked_fill(~children, -1.0)
            children &= torch.zeros_like(children).scatter(2, drawn.argmax(2, keepdim=True), True)
        return fires


def levels(roots: int) -> list[tuple[int, int]]:
    """First feature and width of every level that has children below it."""
    widths = [roots * CHILDREN**depth for depth in range(DEPTH if roots else 0)]
    return [(sum(widths[:depth]), width) for depth, width in enumerate(widths)]


def toy(seed: int, features: int = 256, d_in: int = 64, fired: float = 5.0) -> Truth:
    """Independent features, the r-th most frequent fires as 1 / sqrt(r), ``fired`` on a token on average."""
    often = torch.arange(1, features + 1).float().rsqrt()
    strength = torch.full((features,), 3.5)
    return Truth(_directions(features, d_in, seed), often * fired / often.sum(), strength, strength / 4, 0.7)


def nested(seed: int, features: int = 1024, d_in: int = 128, roots: int = 8) -> Truth:
    """Trees of four children a parent and three levels below the root, then features without a parent."""
    generator = torch.Generator().manual_seed(SEEDS + seed)
    often = zipf(features, 0.5, 0.4, 5e-4)
    factor = 0.1 * torch.randn((features, 25), generator=generator)
    # Rows as long as 1 would leave a feature no chance of its own.
    factor *= (0.99 / factor.square().sum(1)).sqrt().clamp(max=1.0)[:, None]
    return Truth(
        directions=apart(_directions(features, d_in, seed)),
        probability=(often * compensation(often, roots)).clamp(max=1.0),
        mean=torch.linspace(5.0, 4.0, features),
        spread=(0.5 + 0.5 * torch.randn(features, generator=generator)).abs(),
        least=0.0,
        factor=factor,
        roots=roots,
    )


def zipf(features: int, exponent: float, most: float, least: float) -> Tensor:
    """[features] falling as a power of the rank, scaled to lie between ``most`` and ``least``."""
    fall = torch.arange(1, features + 1).float() ** -exponent
    return least + (most - least) * (fall - fall[-1]) / (fall[0] - fall[-1])


def compensation(often: Tensor, roots: int) -> Tensor:
    """[features]: how much more often a child must fire to be seen about ``often``, parent and siblings permitting."""
    factors = torch.ones_like(often)
    for start, width in levels(roots):
        parents = often[start : start + width, None]
        behind = slice(start + width, start + width * (1 + CHILDREN))
        children = often[behind].unflatten(0, (width, CHILDREN))
        siblings = children.sum(1, keepdim=True) - children
        factors[behind] = ((1 + siblings / parents) / parents).flatten()
    return factors


def apart(directions: Tensor, steps: int = 100, rate: float = 3e-4) -> Tensor:
    """Rows pushed away from each other by gradient descent, of length 1."""
    rows = directions.clone().requires_grad_()
    optimiser = torch.optim.Adam([rows], lr=rate)
    for _ in range(steps):
        dots = rows @ rows.T
        off = dots - torch.diag(dots.diagonal())
        loss = off.square().sum() + len(rows) * (dots.diagonal() - 1).square().sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return _unit(rows.detach())


@dataclass(frozen=True)
class Found:
    """How much of a truth an SAE has found. All are shares, 1 is best.

    Attributes:
        mmcs: mean over the true features of the best cosine among the learnt.
        found: share of true features with one above 0.9.
        mcc: mean absolute cosine under the best pairing, one to one.
        uniqueness: distinct true features that a learnt one is nearest to, per learnt one.
        precision: of a learnt feature's firing as a detector of its nearest true one, mean over the learnt.
        recall: of the same.
        f1: of the same.
    """

    mmcs: float
    found: float
    mcc: float
    uniqueness: float
    precision: float
    recall: float
    f1: float


def compare(decoder: Tensor, directions: Tensor, features: Tensor, strength: Tensor) -> Found:
    """decoder [d_sae, d_in], directions [true, d_in], features [tokens, d_sae], strength [tokens, true]."""
    cosine = _unit(directions) @ _unit(decoder).T
    best = cosine.max(1).values
    nearest = cosine.abs().argmax(0)
    precision, recall, f1 = _detection(features != 0, (strength > 0)[:, nearest])
    return Found(
        mmcs=float(best.mean()),
        found=float((best > 0.9).float().mean()),
        mcc=mcc(cosine),
        uniqueness=len(nearest.unique()) / len(nearest),
        precision=precision,
        recall=recall,
        f1=f1,
    )


def mcc(cosine: Tensor) -> float:
    """cosine [a, b] -> mean absolute cosine of the pairs, each used once, that make it largest."""
    gain = cosine.abs() if cosine.shape[0] <= cosine.shape[1] else cosine.abs().T
    return float(gain[torch.arange(len(gain)), torch.from_numpy(pairing(gain.double().numpy()))].mean())


def pairing(gain: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """gain [rows, columns], rows <= columns -> for every row the column of its own that makes the sum largest.

    The Hungarian method by shortest augmenting paths: a row after the other, prices kept so that no pair is cheaper
    than its prices say.
    """
    cost = gain.max() - gain
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    owner = np.full(columns, -1)
    for row in range(rows):
        distance, before = np.full(columns, np.inf), np.full(columns, -1)
        closed = np.zeros(columns, dtype=bool)
        here, column, so_far = row, -1, 0.0
        while True:
            reached = so_far + cost[here] - row_price[here] - column_price
            better = ~closed & (reached < distance)
            distance[better], before[better] = reached[better], column
            column = int(np.where(closed, np.inf, distance).argmin())
            so_far, closed[column] = float(distance[column]), True
            if owner[column] < 0:
                break
            here = owner[column]
        passed = closed & (owner >= 0)
        row_price[owner[passed]] += so_far - distance[passed]
        row_price[row] += so_far
        column_price[closed] -= so_far - distance[closed]
        while column >= 0:
            owner[column] = owner[before[column]] if before[column] >= 0 else row
            column = int(before[column])
    chosen = np.empty(rows, dtype=int)
    chosen[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return chosen


def _detection(fires: Tensor, true: Tensor) -> tuple[float, float, float]:
    """Both [tokens, d_sae] -> precision, recall, F1; each is 0 for a feature of which it is not defined."""
    hits = (fires & true).sum(0).double()
    precision = hits / fires.sum(0).clamp(min=1)
    recall = hits / true.sum(0).clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return float(precision.mean()), float(recall.mean()), float(f1.mean())


def _directions(features: int, d_in: int, seed: int) -> Tensor:
    return _unit(torch.randn((features, d_in), generator=torch.Generator().manual_seed(SEEDS + 100_000 + seed)))


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
