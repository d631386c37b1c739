"""The weights are the minimum that a general optimiser finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from saeguard_sae.train.quality.probes import fit_logistic


@pytest.mark.parametrize("distance", [0.0, 1.0, 30.0])
def test_equals_a_general_optimiser(distance: float) -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.rand(80, generator=generator) < 0.3
    x = torch.randn(80, 4, generator=generator, dtype=torch.float64) + distance * y[:, None]

    def cost(w: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        score = x.numpy() @ w[:4] + w[4]
        losses = np.logaddexp(0, score) - y.numpy() * score
        return float(losses.sum() + 0.5 * (w[:4] ** 2).sum())

    wanted = minimize(cost, np.zeros(5), method="BFGS", options={"gtol": 1e-7})
    found = fit_logistic(x, y)
    got = np.array([*found.weight.tolist(), float(found.bias)])
    assert cost(got) <= wanted.fun + 1e-9
    assert got == pytest.approx(wanted.x, abs=2e-4)


def test_no_features_that_vary() -> None:
    y = torch.tensor([True, False, True, True])
    found = fit_logistic(torch.zeros(4, 2), y)
    assert found.weight.tolist() == [0, 0]
    assert float(torch.sigmoid(found.bias)) == pytest.approx(0.75)


def test_one_class_alone_gives_finite_weights() -> None:
    found = fit_logistic(torch.randn(5, 2), torch.ones(5, dtype=torch.bool))
    assert torch.isfinite(torch.cat([found.weight, found.bias[None]])).all()
