"""The score by which the demonstration's SAEs are chosen among seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from demo.harvest import Harvest
from demo.separation import CONCEPTS, agreement
from saeguard_sae.dictionary import Dictionary, ReLU


def harvest(concepts: tuple[str, ...]) -> Harvest:
    rows = torch.arange(len(concepts))
    return Harvest(ids=rows, next_ids=rows, document=rows, position=rows, concepts=concepts, activations={})


def identity(width: int) -> Dictionary:
    eye, zeros = torch.eye(width), torch.zeros(width)
    return Dictionary(W_enc=eye, b_enc=zeros, W_dec=eye.clone(), b_dec=zeros.clone(), activation=ReLU(), centre=True)


def marks(concepts: tuple[str, ...]) -> Tensor:
    """[tokens, concepts] 1 where the token is of the concept."""
    return torch.tensor([[float(one == concept) for concept in CONCEPTS] for one in concepts])


def test_a_feature_for_each_concept_scores_1_and_a_missing_one_costs_its_part() -> None:
    concepts = (*CONCEPTS, *CONCEPTS, "english", "english")
    data, x = harvest(concepts), marks(concepts)
    assert agreement(identity(len(CONCEPTS)), x, data) == pytest.approx(1.0)
    x[:, 0] = 0.0
    # All tokens marked or none: 2 of 10 tokens, F1 1/3 at best where nothing tells them.
    assert agreement(identity(len(CONCEPTS)), x, data) < 1.0 - 0.6 / len(CONCEPTS)
