"""What our trainer finds of features that we know: independent ones, and ones that fire below each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from saeguard_sae.train.learner import make_learner
from saeguard_sae.train.settings import SaeSettings
from support.truth import Found, Truth, compare, nested, toy

BATCH, BATCHES, STEPS = 1024, 60, 1000
COMMON: dict[str, Any] = {"d_sae": 256, "steps": STEPS, "batch": BATCH, "learning_rate": 3e-3, "seed": 4}


class World(NamedTuple):
    """A truth, activations to learn from, held-out ones, and what each feature contributes to those."""

    truth: Truth
    train: Tensor
    held_out: Tensor
    strength: Tensor


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def independent() -> World:
    return drawn(toy(30))


@pytest.fixture(scope="module")
def below() -> World:
    return drawn(nested(31))


def drawn(truth: Truth) -> World:
    train, _ = truth.sample(BATCH * BATCHES, 32)
    return World(truth, train, *truth.sample(8192, 33))


def learnt(world: World, **settings: Any) -> tuple[Found, float, float]:
    """What is found, the share of held-out variance left, and the features on a token."""
    learner = make_learner(SaeSettings(**COMMON | settings), world.train[:BATCH])
    batches = world.train.split(BATCH)
    for step in range(STEPS):
        learner.step(batches[step % BATCHES])
    sae, x = learner.export(), world.held_out
    features = sae.encode(x)
    left = (x - sae.decode(features, x)).square().sum() / (x - x.mean(0)).square().sum()
    return (
        compare(sae.W_dec, world.truth.directions, features, world.strength),
        float(left),
        float((features != 0).sum(1).float().mean()),
    )


def test_topk_finds_independent_features(independent: World) -> None:
    """Over three seeds: MMCS 0.91 to 0.93, 0.85 of the features, F1 0.64 to 0.66, FVU 0.20 to 0.21."""
    found, left, _ = learnt(independent, architecture="topk", k=5)
    assert found.mmcs > 0.89
    assert found.found > 0.8
    assert found.f1 > 0.6
    assert left < 0.22


def test_batchtopk_finds_independent_features(independent: World) -> None:
    """Over three seeds: MMCS 0.86 to 0.88, F1 0.58 to 0.61, FVU 0.21; the threshold lets through what k says."""
    found, left, fired = learnt(independent, architecture="batchtopk", k=5)
    assert found.mmcs > 0.81
    assert found.f1 > 0.5
    assert left < 0.24
    assert fired == pytest.approx(5, abs=0.25)


def test_matryoshka_finds_features_below_each_other(below: World) -> None:
    """A quarter as many as there are, so its own count. Over three seeds: MCC 0.74 to 0.76, F1 0.70 to 0.71."""
    found, left, fired = learnt(below, architecture="matryoshka", k=7)
    assert found.mcc > 0.69
    assert found.f1 > 0.65
    assert found.uniqueness > 0.95
    assert left < 0.2
    assert fired == pytest.approx(7, abs=0.35)


def test_one_that_does_not_learn_is_seen_to_find_nothing(independent: World) -> None:
    """Neither does it start from the truth."""
    found, left, _ = learnt(independent, architecture="topk", k=5, learning_rate=1e-9)
    assert found.mmcs < 0.4
    assert found.found == 0
    assert found.f1 < 0.15
    assert left > 0.6
