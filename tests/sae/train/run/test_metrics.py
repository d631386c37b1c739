"""Figures on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from saeguard_sae.train.run.config import RunFailed
from saeguard_sae.train.run.progress import MetricsFile, StepMetrics, TensorBoard, last_metrics
from saeguard_sae.train.tracking import LearnerMetrics


def moment(step: int, loss: float = 0.5) -> StepMetrics:
    one = LearnerMetrics(step, step * 4, loss, 3.0, 0.25, 0.125, 1e-3)
    return StepMetrics(
        step=step, steps=9, tokens=step * 4, tokens_per_s=2.0, elapsed_s=3.0, left_s=4.0, saes={"a": one, "b": one}
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_for_each_sae(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.add(moment(1))
    file.add(moment(2, float("nan")))
    assert file.size() == path.stat().st_size
    file.close()
    assert [(line["step"], line["sae"], line["loss"]) for line in lines(path)] == [
        (1, "a", 0.5),
        (1, "b", 0.5),
        (2, "a", None),
        (2, "b", None),
    ]
    assert lines(path)[0] == {
        "step": 1,
        "tokens": 4,
        "sae": "a",
        "loss": 0.5,
        "l0": 3.0,
        "fvu": 0.25,
        "dead_share": 0.125,
        "learning_rate": 1e-3,
        "tokens_per_s": 2.0,
        "elapsed_s": 3.0,
    }
    assert last_metrics(path)["b"]["step"] == 2


def test_what_was_written_after_the_checkpoint_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.add(moment(1))
    size = file.size()
    file.add(moment(2))
    file.close()
    with path.open("ab") as torn:
        torn.write(b'{"step": 3, "sa')
    again = MetricsFile(path, size)
    again.add(moment(2))
    again.close()
    assert [line["step"] for line in lines(path)] == [1, 1, 2, 2]


def test_a_file_that_was_deleted_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 1_000)
    file.add(moment(5))
    file.close()
    assert [line["step"] for line in lines(path)] == [5, 5]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"metrics\.jsonl could not be written"):
        MetricsFile(tmp_path / "none" / "metrics.jsonl", 0)
    full = MetricsFile(Path("/dev/full"), 0)
    with pytest.raises(RunFailed, match="No space left"):
        full.add(moment(1))
    full.close()


class Writer:
    """What TensorBoard's would be told."""

    made: ClassVar[list[tuple[str, int | None]]] = []
    told: ClassVar[list[tuple[str, float, int]]] = []

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.made.append((Path(folder).name, purge_step))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def flush(self) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize("package", ["torch.utils.tensorboard", "tensorboardX"])
def test_tensorboard_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in ("torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setattr(Writer, "told", [])
    board = TensorBoard(tmp_path / "tensorboard", 6)
    board.add(moment(7))
    board.close()
    assert Writer.made == [("tensorboard", 7)]
    assert ("a/fvu", 0.25, 7) in Writer.told
    assert ("b/loss", 0.5, 7) in Writer.told
    assert len(Writer.told) == 2 * 8


def test_no_tensorboard_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    board = TensorBoard(tmp_path / "tensorboard", 0)
    board.add(moment(1))
    board.close()
    assert not list(tmp_path.iterdir())
