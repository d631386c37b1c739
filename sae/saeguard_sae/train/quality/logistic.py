"""Logistic regression with an L2 penalty, by Newton's method: small, exact, the same on every machine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDS = 100
_STEADY = 1e-9
"""A step this small in every weight ends the search."""


class Linear(NamedTuple):
    """A score ``x @ weight + bias``; above 0 means yes."""

    weight: Tensor
    bias: Tensor


def fit(x: Tensor, y: Tensor, penalty: float = 1.0) -> Linear:
    """x [n, d], y [n] bool -> the minimum of ``penalty / 2 * |weight|^2 + sum of losses``; in float64.

    The bias is not penalised. That is scikit-learn's ``LogisticRegression`` with ``C = 1 / penalty``.
    """
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], dim=1)
    y = y.double()
    ridge = torch.full((x.shape[1],), penalty, dtype=torch.float64, device=x.device)
    ridge[-1] = 1e-9  # keeps the bias finite where one side is empty
    w = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for _ in range(_ROUNDS):
        step = _newton(x, y, w, ridge)
        w = w - _shortened(x, y, w, ridge, step) * step
        if float(step.abs().max()) < _STEADY:
            break
    return Linear(w[:-1], w[-1])


def _newton(x: Tensor, y: Tensor, w: Tensor, ridge: Tensor) -> Tensor:
    chance = torch.sigmoid(x @ w)
    slope = x.T @ (chance - y) + ridge * w
    curvature = (x * (chance * (1 - chance))[:, None]).T @ x + torch.diag(ridge)
    solved: Tensor = torch.linalg.solve(curvature, slope)
    return solved


def _shortened(x: Tensor, y: Tensor, w: Tensor, ridge: Tensor, step: Tensor) -> float:
    """The share of the step, halved until it leads down: a full one overshoots where the classes are far apart."""
    share, start = 1.0, _cost(x, y, w, ridge)
    while share > 1e-6 and _cost(x, y, w - share * step, ridge) > start + 1e-12:
        share /= 2
    return share


def _cost(x: Tensor, y: Tensor, w: Tensor, ridge: Tensor) -> float:
    score = x @ w
    return float((torch.nn.functional.softplus(score) - y * score).sum() + 0.5 * (ridge * w * w).sum())
