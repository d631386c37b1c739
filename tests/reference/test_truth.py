"""The synthetic truths by which training is judged: drawn as SAELens draws them, measured as it measures."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.truth import Truth, compare, compensation, levels, nested, toy, zipf

DRAW = Path(__file__).with_name("truth_with_saelens.py")
LIMIT_S = 300
TOKENS, ROOTS, FEATURES = 40_000, 8, 1024


@pytest.fixture(scope="module")
def truth() -> Truth:
    return nested(5, FEATURES, 128, ROOTS)


@pytest.fixture(scope="module")
def learnt() -> dict[str, Tensor]:
    """A decoder that knows most of a toy truth, some of it twice and some backwards, and noisy features."""
    world = toy(6)
    _, strength = world.sample(4000, 7)
    generator = torch.Generator().manual_seed(8)
    rows = torch.randint(len(world.directions), (200,), generator=generator)
    sign = torch.where(torch.rand(200, 1, generator=generator) < 0.1, -1.0, 1.0)
    decoder = sign * world.directions[rows] + 0.03 * torch.randn(200, 64, generator=generator)
    fires = (strength[:, rows] > 0) ^ (torch.rand(4000, 200, generator=generator) < 0.02)
    return {"decoder": decoder, "directions": world.directions, "features": fires.float(), "strength": strength}


@pytest.fixture(scope="module")
def theirs(
    reference_python: Path, truth: Truth, learnt: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray[Any, Any]]:
    """What SAELens draws and measures, once."""
    assert truth.factor is not None
    folder = tmp_path_factory.mktemp("truth")
    given = {"often": zipf(FEATURES, 0.5, 0.4, 5e-4), "factor": truth.factor, "mean": truth.mean}
    given |= {"spread": truth.spread, **learnt}
    np.savez(folder / "given.npz", **{name: value.numpy() for name, value in given.items()})
    done = subprocess.run(
        [reference_python, DRAW, folder], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "found.npz"))


def test_frequencies_and_their_compensation_are_the_same(theirs: dict[str, np.ndarray[Any, Any]]) -> None:
    often = zipf(FEATURES, 0.5, 0.4, 5e-4)
    torch.testing.assert_close(often, torch.from_numpy(theirs["often"]))
    torch.testing.assert_close(compensation(often, ROOTS), torch.from_numpy(theirs["compensation"]))


def test_draws_as_often_as_strongly_and_as_much_together(truth: Truth, theirs: dict[str, np.ndarray[Any, Any]]) -> None:
    _, strength = truth.sample(TOKENS, 9)
    fires = (strength > 0).float()
    # Five standard deviations of the difference of two counts, and a bit for the rarest.
    rate = torch.from_numpy(theirs["rate"])
    noise = 5 * (2 * rate / TOKENS).sqrt() + 5 / TOKENS
    assert ((fires.mean(0) - rate).abs() <= noise).all()
    for start, width in levels(ROOTS):
        below = slice(start + width, start + 5 * width)
        assert fires[:, below].sum() == pytest.approx(float(rate[below].sum()) * TOKENS, rel=0.05)
    assert strength.sum() == pytest.approx(float(theirs["strength"].sum()), rel=0.02)
    together = fires[:, :ROOTS].T @ fires[:, :ROOTS] / TOKENS
    assert (together - torch.from_numpy(theirs["together"])).abs().max() < 0.012
    assert fires.sum(1).mean() == pytest.approx(float(theirs["fired"].mean()), rel=0.02)
    assert fires.sum(1).std() == pytest.approx(float(theirs["fired"].std()), rel=0.05)


def test_children_fire_below_their_parents_and_never_together(truth: Truth) -> None:
    _, strength = truth.sample(TOKENS, 10)
    fires, seen = strength > 0, 0
    for start, width in levels(ROOTS):
        parents = fires[:, start : start + width]
        children = fires[:, start + width : start + 5 * width].unflatten(1, (width, 4))
        assert not (children & ~parents[:, :, None]).any()
        assert children.sum(2).max() == 1
        seen += width
    assert seen == ROOTS * (1 + 4 + 16)


def test_roots_are_correlated(truth: Truth) -> None:
    assert truth.factor is not None
    _, strength = truth.sample(TOKENS, 11)
    found = torch.corrcoef((strength[:, :ROOTS] > 0).float().T)
    wanted = truth.factor[:ROOTS] @ truth.factor[:ROOTS].T
    off = ~torch.eye(ROOTS, dtype=torch.bool)
    assert torch.corrcoef(torch.stack([found[off], wanted[off]]))[0, 1] > 0.8


def test_measures_are_the_same(learnt: dict[str, Tensor], theirs: dict[str, np.ndarray[Any, Any]]) -> None:
    found = compare(**learnt)
    for name in ("mcc", "uniqueness", "precision", "recall", "f1"):
        assert getattr(found, name) == pytest.approx(float(theirs[name]), abs=1e-5), name
    cosine = torch.nn.functional.cosine_similarity(
        learnt["directions"].double()[:, None], learnt["decoder"].double()[None], dim=2
    )
    best = cosine.max(1).values
    assert found.mmcs == pytest.approx(float(best.mean()), abs=1e-5)
    assert found.found == float((best > 0.9).double().mean())
    assert 0.3 < found.found < found.mmcs < 0.9, "neither nothing nor everything is found"


def test_the_truth_itself_is_found_whole() -> None:
    world = toy(6)
    _, strength = world.sample(4000, 7)
    found = compare(world.directions, world.directions, strength, strength)
    assert (found.mmcs, found.found, found.mcc, found.uniqueness) == pytest.approx((1, 1, 1, 1), abs=1e-5)
    assert (found.precision, found.recall, found.f1) == pytest.approx((1, 1, 1))


def test_a_toy_fires_as_it_says() -> None:
    world = toy(6)
    x, strength = world.sample(50_000, 12)
    fires = (strength > 0).float()
    assert fires.sum(1).mean() == pytest.approx(5, rel=0.01)
    assert fires[:, 0].mean() / fires[:, 3].mean() == pytest.approx(2, rel=0.05)
    values = strength[strength > 0]
    assert float(values.mean()) == pytest.approx(3.5, rel=0.01)
    assert float(values.min()) == pytest.approx(0.7)
    torch.testing.assert_close(x, strength @ world.directions)
