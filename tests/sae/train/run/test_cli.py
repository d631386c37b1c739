"""``saeguard train``: flags, exit codes, and a line for every way out."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeguard_sae.train.run import run
from saeguard_sae.train.run.cli import FLAGS, add_train, train_overrides
from saeguard_sae.train.run.config import RunConfig, RunFailed, RunStopped, load_run_config

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="saeguard")
    add_train(parser.add_subparsers())
    return parser.parse_args(["train", *words])


def exit_code(*words: str) -> int:
    arguments = parsed(*words)
    code: int = arguments.run(arguments)
    return code


def test_trains_and_prints_where(tree: Tree, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(str(write(tree))) == 0
    told = capsys.readouterr()
    assert told.out == f"{tree['run']['out']}/saes/mid\n"
    assert "step 40/40" in told.err


def test_every_flag_is_a_key(tree: Tree, write: Write) -> None:
    values = {"--out": "there", "--tokens": "99", "--batch": "32", "--seed": "4", "--threads": "2", "--device": "cpu"}
    assert values.keys() == FLAGS.keys()
    arguments = parsed("c.toml", *(word for pair in values.items() for word in pair))
    config = load_run_config(write(tree), train_overrides(arguments))
    assert config.model is not None
    assert (config.run.out, config.run.tokens, config.stream.batch) == ("there", 99, 32)
    assert (config.run.seed, config.stream.seed, config.run.threads, config.model.device) == (4, 4, 2, "cpu")
    assert train_overrides(parsed("c.toml")) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"saes": [{"name": "a", "site": "resid_post.1", "d_sae": 4, "k": 5}]}, "saes[0]: k must be 1 to d_sae (4)"),
        ({"data": {"path": "/no/such/text.jsonl"}}, "data.path: there is no file"),
        ({"more": {}}, "more: no such key"),
    ],
)
def test_a_bad_configuration_is_one_line_and_2(
    tree: Tree, write: Write, capsys: pytest.CaptureFixture[str], changes: Tree, said: str
) -> None:
    assert exit_code(str(write(tree | changes))) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 or told[-1].startswith("saeguard train: ")
    assert said in told[-1]
    assert not any("Traceback" in line for line in told)


def test_no_configuration_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(str(tmp_path / "none.toml")) == 2
    assert capsys.readouterr().err == f"saeguard train: {tmp_path / 'none.toml'}: No such file or directory\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RunFailed("the disk is full"), 1, "saeguard train: the disk is full\n"),
        (
            RunStopped(15, 1_200, 5_000),
            143,
            "saeguard train: stopped by SIGTERM after step 1,200 of 5,000, which is saved; go on with: "
            "saeguard train {path} --resume --tokens 128\n",
        ),
        (RunStopped(2, 1, 5), 130, "--resume --tokens 128\n"),
        (KeyboardInterrupt(), 130, "saeguard train: interrupted; --resume goes on from the last checkpoint\n"),
        (ZeroDivisionError("oh"), 1, "saeguard train: failed unexpectedly, ZeroDivisionError: oh\n"),
    ],
)
def test_every_way_out_has_a_line(
    tree: Tree,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def failing(config: RunConfig, *, resume: bool) -> list[Path]:
        raise error

    monkeypatch.setattr(run, "train_from_config", failing)
    path = write(tree)
    assert exit_code(str(path), "--tokens", "128") == code
    told = capsys.readouterr().err
    assert told.endswith(said.format(path=path))
    assert ("Traceback" in told) == isinstance(error, ZeroDivisionError)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tree: Tree, write: Write) -> None:
    """From step 30 on, as it were: no file may be larger than 50 kB."""
    tree["run"] |= {"tokens": 64 * 60, "checkpoint_every": 10, "log_every": 10}
    program = (
        "import argparse, sys\n"
        "from saeguard_sae.train.run import checkpoints\n"
        "from saeguard_sae.train.run.cli import add_train\n"
        "parser = argparse.ArgumentParser()\n"
        "add_train(parser.add_subparsers())\n"
        "arguments = parser.parse_args(['train', sys.argv[1]])\n"
        "import resource\n"
        "save = checkpoints.Checkpoints.save\n"
        "def limited(self, checkpoint):\n"
        "    if checkpoint.step == 30:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "    return save(self, checkpoint)\n"
        "checkpoints.Checkpoints.save = limited\n"
        "sys.exit(arguments.run(arguments))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(write(tree))], capture_output=True, text=True, check=False, timeout=120
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("saeguard train: run.out: the checkpoint of step 30 could not be written to ")
    assert last.endswith("(File too large); the checkpoint of step 20 is kept")
    assert "Traceback" not in done.stderr
    kept = sorted(path.name for path in (Path(tree["run"]["out"]) / "checkpoints").iterdir())
    assert kept == ["step-000000000010.pt", "step-000000000020.pt"]
