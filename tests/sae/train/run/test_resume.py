"""A run that is killed at random moments ends with the bytes of one that was left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from saeguard_sae.train.run.config import RunConfig, RunStopped, parse_run_config
from saeguard_sae.train.run.progress import Console
from saeguard_sae.train.run.run import train_from_config
from saeguard_sae.train.stream import ActivationStream

KILLS = 10
STEPS = 240
DEADLINE_S = 60.0

# Processes are forked from one that has imported everything: each is a real one, and none waits for imports.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["saeguard_sae.train.run.run", "transformers.models.llama.modeling_llama"])


def _train(config: RunConfig, errors: str) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    with open(errors, "a", encoding="utf-8") as file, redirect_stderr(file):
        try:
            train_from_config(config, resume=True, console=Console(file))
        except RunStopped as err:
            sys.exit(128 + err.number)
        except Exception:
            traceback.print_exc()
            raise


def _started(config: RunConfig, errors: Path) -> BaseProcess:
    process = _processes.Process(target=_train, args=(config, str(errors)))
    process.start()
    return process


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it should have happened by now"
        time.sleep(0.002)


def _wait_for(process: BaseProcess, out: Path, step: int) -> None:
    """Until the run has told figures of this step, or has ended."""
    _wait(lambda: _written(out) >= step or not process.is_alive())


def _written(out: Path) -> int:
    """Steps that the run has told figures of."""
    metrics = out / "metrics.jsonl"
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.is_file() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _outcome(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The SAEs' weights, and the figures but for their times."""
    weights = {path.parent.name: path.read_bytes() for path in sorted(out.glob("saes/*/sae_weights.safetensors"))}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timeless = [{key: value for key, value in line.items() if not key.endswith("_s")} for line in lines]
    return weights, timeless


@pytest.fixture
def config(tree: dict[str, Any]) -> dict[str, Any]:
    """Every kind of learner; masks, several epochs, dead features."""
    tree["run"] |= {"tokens": 64 * STEPS, "log_every": 3, "checkpoint_every": 7, "threads": 1}
    sae = tree["saes"][0]
    tree["saes"] = [
        {**sae, "dead_after": 0.01},
        {**sae, "name": "row", "architecture": "topk"},
        {**sae, "name": "over", "site": "mlp_in.1", "write_site": "mlp_out.1", "architecture": "batchtopk"},
        {"name": "jump", "site": "resid_post.0", "d_sae": 64, "architecture": "jumprelu", "sparsity": 0.5},
    ]
    return tree


def test_killed_ten_times_it_ends_with_the_same_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    alone, killed, errors = tmp_path / "alone", tmp_path / "killed", tmp_path / "errors"
    config["run"]["out"] = str(alone)
    undisturbed = _started(parse_run_config(config), errors)
    config["run"]["out"] = str(killed)
    chance = random.Random(time.time_ns())
    reached = []
    for number in range(KILLS):
        process = _started(parse_run_config(config), errors)
        # Some while it starts, the others while it goes, further on each time.
        if chance.random() < 0.3:
            time.sleep(chance.random() * 0.5)
        else:
            _wait_for(process, killed, max(_written(killed), number * STEPS // (KILLS + 1)) + 1)
            time.sleep(chance.random() * 0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(_written(killed))
        assert process.exitcode == -signal.SIGKILL, f"it must not be done yet: {reached}\n{errors.read_text()}"
    last = _started(parse_run_config(config), errors)
    for process in (undisturbed, last):
        process.join(DEADLINE_S)
        assert process.exitcode == 0, errors.read_text(encoding="utf-8")
    assert max(reached) > 0
    weights, figures = _outcome(killed)
    assert len(weights) == 4
    assert weights == _outcome(alone)[0], f"killed at steps {reached}"
    assert figures == _outcome(alone)[1], f"killed at steps {reached}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_nothing_is_lost(
    config: dict[str, Any], tmp_path: Path, console: Console, number: signal.Signals
) -> None:
    out, errors = Path(config["run"]["out"]), tmp_path / "errors"
    # No checkpoint is due before the end: the one that is found is the signal's.
    config["run"] |= {"checkpoint_every": 10**6, "log_every": 1}
    process = _started(parse_run_config(config), errors)
    _wait_for(process, out, 5)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(DEADLINE_S)
    assert process.exitcode == 128 + number, errors.read_text(encoding="utf-8")
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{_written(out):012}.pt"
    again = _started(parse_run_config(config), errors)
    again.join(DEADLINE_S)
    assert again.exitcode == 0, errors.read_text(encoding="utf-8")
    config["run"]["out"] = str(tmp_path / "alone")
    train_from_config(parse_run_config(config), console=console)
    assert _outcome(out)[0] == _outcome(tmp_path / "alone")[0]


def test_a_checkpoint_without_its_stream_would_be_seen(
    config: dict[str, Any], tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the comparison above can fail: one that goes on with the data's start ends elsewhere."""
    config["saes"] = config["saes"][:1]
    outcomes = []
    for name in ("whole", "forgetful"):
        config["run"]["out"] = str(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(ActivationStream, "batch", _stopping_after(30, ActivationStream.batch))
            with pytest.raises(KeyboardInterrupt):
                train_from_config(parse_run_config(config), console=console)
        if name == "forgetful":
            monkeypatch.setattr(ActivationStream, "resume", lambda self, state: None)
        train_from_config(parse_run_config(config), resume=True, console=console)
        outcomes.append(_outcome(tmp_path / name)[0])
    assert outcomes[0] != outcomes[1]


def _stopping_after(count: int, batch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    left = [count]

    def stopping(source: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return batch(source)

    return stopping
