"""Cross-entropy and KL equal the formulas in float64."""

from __future__ import annotations

import pytest
import torch

from saeguard_sae import metrics
from saeguard_sae.metrics import NextTokenLoss
from saeguard_sae.train.quality.evaluation_data import EvaluationRow, pad_rows


@pytest.mark.parametrize("positions", [3, 128])
def test_equals_the_formulas(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_POSITIONS", positions)
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(0, 17, (length,), generator=generator) for length in (9, 5, 1)]
    batch = pad_rows([EvaluationRow(one, torch.ones(len(one), dtype=torch.bool)) for one in ids])
    logits, base = (torch.randn(3, 9, 17, generator=generator) * 2 for _ in range(2))
    nats, divergences = [], []
    for at, one in enumerate(ids):
        p = logits[at, : len(one) - 1].double().softmax(-1)
        q = base[at, : len(one) - 1].double().softmax(-1)
        nats.append(-p.gather(1, one[1:, None]).log().flatten())
        divergences.append((p * (p.log() - q.log())).sum(-1))
    found = NextTokenLoss()
    found.add(logits, batch.ids, batch.predicted, base)
    assert found.positions == 8 + 4
    assert found.cross_entropy == pytest.approx(float(torch.cat(nats).mean()), rel=1e-6)
    # Of the changed model from the base, not the other way round, which is another number here.
    assert found.divergence == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-5)
    found.add(logits, batch.ids, batch.predicted, base)
    assert found.positions == 24
    assert found.cross_entropy == pytest.approx(float(torch.cat(nats).mean()), rel=1e-6)
