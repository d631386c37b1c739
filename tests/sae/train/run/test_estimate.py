"""What a run needs, against what learners really hold, and what is refused."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saeguard_sae.models import Site
from saeguard_sae.train.learner import make_learner
from saeguard_sae.train.run import config as plans
from saeguard_sae.train.run.checkpoints import Checkpoint, Checkpoints
from saeguard_sae.train.run.config import BadConfig, SaePlan, check_disk, check_memory
from saeguard_sae.train.settings import SaeSettings

CPU = torch.device("cpu")


def storages() -> dict[int, int]:
    """Bytes of every tensor's memory that is alive, by address; packed weights of other tests have none to look at."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    alive = [one for one in gc.get_objects() if type(one) in kinds and one.layout is torch.strided]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in alive}


def size(d_in: int = 64, d_out: int = 64, name: str = "small", **changes: Any) -> SaePlan:
    settings: dict[str, Any] = {"d_sae": 2_048, "k": 4, "steps": 10, "batch": 32, "kernels": "torch", **changes}
    site = Site(1, "resid_post")
    return SaePlan(name=name, reads=site, writes=None, settings=SaeSettings(**settings), d_in=d_in, d_out=d_out)


SIZES = {
    "matryoshka": size(),
    "transcoder": size(d_in=32, d_out=48, is_transcoder=True),
    "float32": size(precision="float32"),
    "gated": size(architecture="gated", k=0, sparsity=1.0),
    "jumprelu": size(architecture="jumprelu", k=0, sparsity=1.0),
}


@pytest.mark.parametrize("kind", SIZES)
def test_a_checkpoint_is_as_large_as_was_said(kind: str, tmp_path: Path) -> None:
    one = SIZES[kind]
    x = torch.randn(64, one.d_in)
    learner = make_learner(one.settings, x, torch.randn(64, one.d_out) if one.settings.is_transcoder else None)
    checkpoint = Checkpoint(
        step=1, config="", learners={"a": learner.state()}, stream={}, metrics=0, elapsed_s=0, rng=torch.get_rng_state()
    )
    written = Checkpoints(tmp_path, 1).save(checkpoint).stat().st_size
    assert written == pytest.approx(one.checkpoint_bytes(), rel=0.05)


@pytest.mark.parametrize("kind", ["matryoshka", "float32"])
def test_training_counts_weights_gradients_moments_and_the_copy(kind: str) -> None:
    """Besides these, two copies of 512 tokens' pre-activations, which only a step has."""
    one = SIZES[kind]
    # What is garbage by now would make room for the learner, and be taken for what was there before it.
    gc.collect()
    before, x = storages(), torch.randn(64, one.d_in)
    learner = make_learner(one.settings, x)
    held = sum(size for at, size in storages().items() if at not in before)
    del learner
    assert held < one.training_bytes() - 2 * 512 * one.settings.d_sae * 4 < 1.1 * held


def test_memory_that_is_not_there_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "free_bytes", lambda device: 2**30)
    wide = size(d_in=4096, d_out=4096, name="wide", d_sae=65_536)
    check_memory([size()], 1000, CPU)
    with pytest.raises(BadConfig) as caught:
        check_memory([size(), wide], 2**20, CPU)
    said = str(caught.value)
    assert said.startswith("saes: training would need about ")
    assert "on cpu, where 1.00 GiB are available" in said
    assert "(wide 8." in said
    assert "small 0.0" in said
    with pytest.raises(BadConfig, match=r"the buffer 1\.00 GiB"):
        check_memory([size()], 2**29, CPU)


def test_a_disk_that_is_too_small_is_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = size()
    needed = 3 * (one.checkpoint_bytes() + 500) + one.export_bytes()
    folder = tmp_path / "none" / "yet"
    monkeypatch.setattr(plans.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    check_disk([one], 500, 2, folder)
    monkeypatch.setattr(plans.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(
        BadConfig, match=r"^run\.out: 3 checkpoints of 0\.00 GiB .* has 0\.01 GiB free; lower run\.keep"
    ):
        check_disk([one], 500, 2, folder)
    folder.mkdir(parents=True)
    (folder / "old").write_bytes(b"x")
    check_disk([one], 500, 2, folder)
