"""Every kind of SAE, trained by several processes, against one process that has the whole batch and all features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard_sae.train import SaeSettings, make_learner
from saeguard_sae.train.learner import SparseLearner
from saeguard_sae.train.parallel import ALONE, Mesh, join_processes, mesh_of
from support.processes import World

STEPS, BATCH, D_IN, D_SAE = 6, 96, 24, 64
SETTINGS = SaeSettings(d_sae=D_SAE, k=5, steps=40, batch=BATCH, learning_rate=5e-3, clip=0.05, seed=5)
PAYING: dict[str, Any] = {"k": 0, "sparsity": 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "matryoshka": {"kernels": "torch"},
    "batchtopk": {"architecture": "batchtopk", "precision": "float32"},
    "topk": {"architecture": "topk", "kernels": "torch"},
    "transcoder": {"architecture": "batchtopk", "is_transcoder": True},
    "relu": {"architecture": "relu", **PAYING},
    "gated": {"architecture": "gated", **PAYING},
    "jumprelu": {"architecture": "jumprelu", **PAYING},
}
DEAD = slice(20, 44)


def trained(mesh: Mesh, **changes: Any) -> dict[str, Tensor]:
    """What is left of it after some steps: its whole state, its figures, what it exports."""
    settings = replace(SETTINGS, **changes)
    x = activations(1, D_IN)
    target = activations(2, D_IN + 8) if settings.is_transcoder else None
    learner = make_learner(settings, x, target, mesh=mesh)
    learner.load_state(begun(settings, x, target))
    for step in range(STEPS):
        rows = (torch.arange(BATCH) * 7 + step * BATCH) % len(x)
        learner.step(mesh.rows(x[rows]), None if target is None else mesh.rows(target[rows]))
    now, made = learner.metrics(), learner.export()
    figures = torch.tensor([now.loss, now.l0, now.fvu, now.dead_share])
    state = {name: tensor.clone() for name, tensor in learner.state().items()}
    return state | {
        "figures": figures,
        "exported": torch.cat([made.W_enc.T.flatten(), made.b_enc, made.W_dec.flatten()]),
    }


def begun(settings: SaeSettings, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
    """Features that are dead, half of which AuxK can reach, and two of each: which of equal ones fires is decided."""
    state = make_learner(settings, x, target).state()
    state["silent"][DEAD] = 1000
    if settings.is_selecting:
        state["b_enc"][DEAD.start : 32] = -3.0
        state["W_enc"][32:] = state["W_enc"][:32]
    return state


def activations(seed: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(80, width, generator=generator), dim=1)
    strength = torch.rand(1000, 80, generator=torch.Generator().manual_seed(0))
    return 3 * (strength * (strength > 0.92)) @ rows + 1


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return {name: trained(ALONE, **kind) for name, kind in KINDS.items()}


def in_every_layout(folder: str) -> None:
    """As many parts of the features as there are processes, or fewer, and the rest deals out the batch."""
    with join_processes(1, BATCH, "cpu", str) as first:
        for shards in (1, 2, 4):
            if first.size % shards == 0:
                mesh = mesh_of(shards, BATCH)
                found = {name: trained(mesh, **kind) for name, kind in KINDS.items()}
                check_aligned(mesh)
                if mesh.is_writer:
                    torch.save(found, f"{folder}/{mesh.data}x{mesh.shards}.pt")


def check_aligned(mesh: Mesh) -> None:
    """Processes that came apart, as on other processors, go on from one state."""
    x = activations(1, D_IN)
    for kind in (KINDS["batchtopk"], KINDS["relu"]):
        learner = make_learner(replace(SETTINGS, **kind), x, mesh=mesh)
        learner.step(mesh.rows(x[:BATCH]))
        weights = learner.rows.W_enc if isinstance(learner, SparseLearner) else learner.weights["W_enc"].detach()
        weights += mesh.rank
        learner.align()
        learner.step(mesh.rows(x[:BATCH]))
        first = [
            mesh.gather_objects(weights.double().sum().item())[shard :: mesh.shards] for shard in range(mesh.shards)
        ]
        assert all(len(set(one)) == 1 for one in first), first


@pytest.mark.parametrize(("size", "layouts"), [(2, ("2x1", "1x2")), (4, ("4x1", "2x2", "1x4"))])
def test_several_processes_are_one_within_rounding(
    alone: dict[str, dict[str, Tensor]], tmp_path: Path, size: int, layouts: tuple[str, ...]
) -> None:
    world = World(size, tmp_path / "errors", in_every_layout, str(tmp_path))
    assert world.codes() == [0] * size, world.said()
    for layout in layouts:
        for name, found in torch.load(tmp_path / f"{layout}.pt").items():
            assert found.keys() == alone[name].keys()
            for part, wanted in alone[name].items():
                where = f"{layout} {name} {part}"
                close = torch.isclose(found[part].double(), wanted.double(), rtol=1e-4, atol=2e-5)
                assert bool(close.all()), f"{where}: {(found[part] - wanted).abs().max()}"


def test_what_is_compared_had_dead_features_that_learned_and_some_that_began_anew(
    alone: dict[str, dict[str, Tensor]],
) -> None:
    learned = alone["topk"]["clock"]
    assert float((learned[32 : DEAD.stop] > 0).double().mean()) > 0.5
    assert float(alone["topk"]["b_enc"][DEAD.start : 32].max()) > -1.0


def test_of_equal_features_the_lowest_fires() -> None:
    x = activations(1, D_IN)
    settings = replace(SETTINGS, architecture="topk", k=1, aux_weight=0.0)
    learner = make_learner(settings, x)
    learner.load_state(begun(settings, x, None) | {"silent": torch.zeros(D_SAE, dtype=torch.int32)})
    learner.step(x[:BATCH])
    fired = learner.state()["silent"] == 0
    assert bool(fired[:20].any())
    assert not bool(fired[32:52].any())
