"""Activations made of a dictionary that is known, and how much of it an SAE has found."""

from __future__ import annotations

import torch
from torch import Tensor

D_IN, TRUE_FEATURES, ACTIVE = 24, 40, 2


def truth(seed: int) -> Tensor:
    """Unit rows [TRUE_FEATURES, D_IN]. Its seeds are never the trainer's: shared ones would leak the answer."""
    rows = torch.randn(TRUE_FEATURES, D_IN, generator=torch.Generator().manual_seed(90_000 + seed))
    return rows / rows.norm(dim=1, keepdim=True)


def observations(rows: Tensor, tokens: int, seed: int) -> Tensor:
    """Sparse positive mixtures of the rows plus a constant, [tokens, D_IN], of no particular scale."""
    generator = torch.Generator().manual_seed(80_000 + seed)
    fires = torch.rand(tokens, len(rows), generator=generator) < ACTIVE / len(rows)
    strength = fires * (0.5 + torch.rand(tokens, len(rows), generator=generator))
    return 7.0 * (strength @ rows) + 2.0


def recovery(learnt: Tensor, rows: Tensor) -> float:
    """Mean over the true rows of the best cosine among the learnt ones [F, D_IN] (MMCS)."""
    learnt = learnt / learnt.norm(dim=1, keepdim=True)
    return float((rows @ learnt.T).max(1).values.mean())
