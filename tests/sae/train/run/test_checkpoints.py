"""Checkpoints come back as they were, are whole or not there, and outlive a full disk."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

import pytest
import torch

from saeguard_sae.train.run.checkpoints import Checkpoint, Checkpoints
from saeguard_sae.train.run.config import RunFailed


def state(step: int, size: int = 8) -> Checkpoint:
    values = torch.randn(size, generator=torch.Generator().manual_seed(step))
    return Checkpoint(
        step=step,
        config='{"a": 1}',
        learners={"mid": {"W": values, "half": values.bfloat16(), "steps": torch.tensor(step)}},
        stream={"source": {"row": 3, "name": "x"}, "limits": {"resid_post.1": float("inf")}, "buffer": {"t": values}},
        metrics=17,
        elapsed_s=1.5,
        rng=torch.get_rng_state(),
    )


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    there = Checkpoints(tmp_path / "deep" / "checkpoints", keep=2)
    assert there.latest() is None
    saved = state(3)
    there.save(saved)
    found = there.latest()
    assert found is not None
    assert (found.step, found.config, found.metrics, found.elapsed_s) == (3, '{"a": 1}', 17, 1.5)
    for name, tensor in saved.learners["mid"].items():
        assert found.learners["mid"][name].dtype == tensor.dtype
        assert torch.equal(found.learners["mid"][name], tensor)
    assert found.stream["source"] == saved.stream["source"]
    assert found.stream["limits"] == saved.stream["limits"]
    assert torch.equal(found.stream["buffer"]["t"], saved.stream["buffer"]["t"])
    assert torch.equal(found.rng, saved.rng)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    there = Checkpoints(tmp_path, keep=2)
    for step in (1, 20, 3_000):
        there.save(state(step))
    assert [path.name for path in there.paths()] == ["step-000000000020.pt", "step-000000003000.pt"]
    found = there.latest()
    assert found is not None
    assert found.step == 3_000
    assert there.resumable() == "the checkpoint of step 3,000 is kept"


def test_one_that_was_begun_is_none(tmp_path: Path) -> None:
    there = Checkpoints(tmp_path, keep=2)
    there.save(state(1))
    part = tmp_path / "step-000000000002.pt.part"
    part.write_bytes(there.paths()[0].read_bytes()[:100])
    found = there.latest()
    assert found is not None
    assert found.step == 1
    there.discard_parts()
    assert not part.exists()
    assert len(there.paths()) == 1


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "pickle"])
def test_a_damaged_one_is_named(tmp_path: Path, damage: str) -> None:
    there = Checkpoints(tmp_path, keep=2)
    path = there.save(state(1, 4_000))
    whole = path.read_bytes()
    if damage == "pickle":
        torch.save({"format": 99}, path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "noise": b"\x00" * 500, "empty": b""}[damage])
    with pytest.raises(RunFailed, match=r"step-000000000001\.pt (cannot be read|is not a checkpoint)"):
        there.latest()


def _save_on_a_full_disk(folder: str, keep: int) -> None:
    """A process of its own: what is limited stays limited. 1: it failed as it should."""
    there = Checkpoints(Path(folder), keep)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        there.save(state(2, 100_000))
    except RunFailed as err:
        (Path(folder) / "said").write_text(str(err), encoding="utf-8")


def test_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    there = Checkpoints(tmp_path, keep=1)
    whole = there.save(state(1)).read_bytes()
    child = multiprocessing.get_context("spawn").Process(target=_save_on_a_full_disk, args=(str(tmp_path), 1))
    child.start()
    child.join(60)
    assert child.exitcode == 0, "torch's writer must not end the process"
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert "the checkpoint of step 2 could not be written" in said
    assert said.endswith("(File too large)")
    assert there.resumable() == "the checkpoint of step 1 is kept"
    assert [path.name for path in there.paths()] == ["step-000000000001.pt"]
    assert there.paths()[0].read_bytes() == whole
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    there = Checkpoints(blocked / "checkpoints", keep=1)
    with pytest.raises(RunFailed, match="the checkpoint of step 1 could not be written to"):
        there.save(state(1))
    assert there.resumable() == "there is no checkpoint yet"
