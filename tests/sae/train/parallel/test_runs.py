"""Whole runs in several processes: the files of one process, and checkpoints that any number of them goes on from."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saeguard_sae.train.activations import ActivationReader
from saeguard_sae.train.run.config import parse_run_config
from saeguard_sae.train.run.progress import Console
from saeguard_sae.train.run.run import train_from_config
from support.processes import World

Tree = dict[str, Any]


def train(tree: Tree, passes: str) -> None:
    """In one of several processes; adds a line with its forward passes to a file."""
    count, read = [0], ActivationReader.read

    def counted(self: ActivationReader, rows: Any) -> Any:
        count[0] += 1
        return read(self, rows)

    ActivationReader.read = counted  # type: ignore[method-assign]
    train_from_config(parse_run_config(tree), resume=True, console=Console(io.StringIO()))
    with open(passes, "a", encoding="utf-8") as file:
        file.write(f"{count[0]}\n")


def placed(tree: Tree, out: Path, shards: int = 1) -> Tree:
    return {**tree, "run": {**tree["run"], "out": str(out)}, "parallel": {"shards": shards}}


def check_same(one: Path, other: Path) -> None:
    """SAEs and figures, within rounding."""
    for name in ("mid", "jump"):
        wanted, found = (load_file(out / "saes" / name / "sae_weights.safetensors") for out in (one, other))
        assert wanted.keys() == found.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=2e-5)
    figures = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for out in (one, other)
    ]
    assert len(figures[0]) == len(figures[1]) == 8
    for wanted, found in zip(*figures, strict=True):
        assert (found["step"], found["tokens"], found["sae"]) == (wanted["step"], wanted["tokens"], wanted["sae"])
        assert [found[key] for key in ("loss", "l0", "fvu", "dead_share")] == pytest.approx(
            [wanted[key] for key in ("loss", "l0", "fvu", "dead_share")], rel=1e-4
        )


def test_two_processes_leave_what_one_does_and_any_number_goes_on(tree: Tree, tmp_path: Path) -> None:
    alone, two, four, one = (tmp_path / name for name in ("alone", "two", "four", "one"))
    train(placed(tree, alone), str(tmp_path / "passes-1"))
    world = World(2, tmp_path / "errors", train, placed(tree, two), str(tmp_path / "passes-2"))
    assert world.codes() == [0, 0], world.said()
    check_same(alone, two)
    (whole,) = map(int, (tmp_path / "passes-1").read_text().split())
    shares = list(map(int, (tmp_path / "passes-2").read_text().split()))
    assert max(shares) <= whole / 2 + 4, "the model's work must be dealt out"
    for again in (four, one):
        shutil.copytree(two, again)
        (again / "checkpoints" / "step-000000000024.pt").unlink()
        shutil.rmtree(again / "saes")
    world = World(4, tmp_path / "errors", train, placed(tree, four, shards=2), str(tmp_path / "passes-4"))
    train(placed(tree, one), str(tmp_path / "passes-1"))
    assert world.codes() == [0] * 4, world.said()
    check_same(alone, four)
    check_same(alone, one)
