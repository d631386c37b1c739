"""What proposes features, where several processes share a batch; none of them needs to be there."""

from __future__ import annotations

import torch
from torch import Tensor

from saeguard_sae.train import SaeSettings
from saeguard_sae.train.kernels.compiled import choose_kernels
from saeguard_sae.train.kernels.torch_kernels import FeatureRows
from saeguard_sae.train.learner import Proposer
from saeguard_sae.train.parallel import Mesh

D_IN, FEATURES, TOKENS = 8, 24, 6


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(800_000 + seed))


def test_a_process_without_any_of_the_batchs_first_tokens_revives_nothing() -> None:
    """Two share six tokens each, and dead features learn from one token in twelve, which the first process has."""
    settings = SaeSettings(d_sae=FEATURES, k=3, steps=10, batch=2 * TOKENS, architecture="topk", aux_share=1 / 12)
    rows = FeatureRows.new(draw(FEATURES, D_IN, seed=1), draw(FEATURES, D_IN, seed=2), "int8")
    dead = torch.zeros(FEATURES, dtype=torch.bool)
    dead[5:20] = True
    counts = []
    for rank in range(2):
        proposer = Proposer(settings, choose_kernels("auto", torch.device("cpu")), rows, D_IN, Mesh(data=2, rank=rank))
        aux = proposer.propose(draw(TOKENS, D_IN, seed=3), dead).aux
        assert aux is not None
        assert dead[aux.feature.long()].all()
        counts.append(len(aux.starts) - 1)
    assert counts == [1, 0]
    assert len(aux.feature) == 0
