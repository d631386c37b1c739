"""Sums over parts equal the formulas over all tokens in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saeguard_sae.check import measure
from saeguard_sae.check.measure import reader, reconstruct_counted
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.metrics import SaeMetrics

CPU = torch.device("cpu")


@pytest.mark.parametrize("values", [90 * 7, 2**24])
def test_equals_the_formulas(
    values: int, random_sae: Callable[..., Dictionary], formula: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "VALUES", values)
    dictionary = random_sae(24)
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(8)) + 2
    features, made = formula(dictionary, x.double())
    found, seen = SaeMetrics(90, CPU), []
    for part in (x[:61], x[61:]):
        watch = lambda f, start: seen.append((start, len(f)))  # noqa: E731
        reconstruction = reconstruct_counted(reader(dictionary), part, found, watch=watch)
        assert reconstruction is not None
        found.compare(reconstruction, part)
    assert max(size for _, size in seen) <= max(1, values // 90)
    wanted = x.double()
    is_on = features != 0
    assert found.tokens == 200
    assert found.l0 == pytest.approx(float(is_on.sum(1).double().mean()))
    assert found.by_l0.tolist() == torch.bincount(is_on.sum(1), minlength=91).tolist()
    assert found.dead_share == pytest.approx(float((~is_on.any(0)).double().mean()))
    assert found.density.tolist() == pytest.approx(is_on.double().mean(0).tolist())
    spread = (wanted - wanted.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float((made - wanted).square().sum() / spread), rel=1e-5)
    cosine = torch.cosine_similarity(made, wanted, dim=1).mean()
    assert found.cosine == pytest.approx(float(cosine), rel=1e-5)
    assert found.norm_ratio == pytest.approx(float((made.norm(dim=1) / wanted.norm(dim=1)).mean()), rel=1e-5)


def test_tokens_of_zeros_have_no_direction() -> None:
    found = SaeMetrics(3, CPU)
    found.compare(torch.ones(2, 4), torch.tensor([[2.0] * 4, [0.0] * 4]))
    assert found.cosine == pytest.approx(1)
    assert found.norm_ratio == pytest.approx(0.5)
    found.compare(torch.zeros(1, 4), torch.ones(1, 4))
    assert found.cosine == pytest.approx(0.5)
