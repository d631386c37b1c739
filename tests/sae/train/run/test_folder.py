"""Whose a run's folder is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from saeguard_sae.train.run.checkpoints import RunFolder
from saeguard_sae.train.run.config import BadConfig, parse_run_config


def test_new_and_empty_folders_are_free(tree: dict[str, Any], tmp_path: Path) -> None:
    config = parse_run_config(tree)
    for resume in (False, True):
        RunFolder(tmp_path / "none").check(config, resume=resume)
        (tmp_path / "empty").mkdir(exist_ok=True)
        RunFolder(tmp_path / "empty").check(config, resume=resume)


def test_a_run_is_gone_on_with_or_left_alone(tree: dict[str, Any], tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path / "out"), parse_run_config(tree)
    folder.claim(config)
    with pytest.raises(BadConfig, match="already holds a run; --resume goes on with it"):
        folder.check(config, resume=False)
    folder.check(config, resume=True)
    tree["saes"][0]["k"] = 5
    with pytest.raises(BadConfig, match=r"another configuration: saes\.mid\.settings\.k was 4, now is 5$"):
        folder.check(parse_run_config(tree), resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_no_run_is_not_touched(tree: dict[str, Any], tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(BadConfig, match="something that is no run"):
        RunFolder(tmp_path).check(parse_run_config(tree), resume=resume)
    with pytest.raises(BadConfig, match="is not a folder"):
        RunFolder(tmp_path / "thesis.txt").check(parse_run_config(tree), resume=resume)


def test_one_killed_while_it_claimed_is_free(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.json.part").write_text("{", encoding="utf-8")
    RunFolder(tmp_path).check(parse_run_config(tree), resume=True)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": 3}'])
def test_a_broken_mark_is_named(tree: dict[str, Any], tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(BadConfig, match=r"run\.json cannot be read"):
        RunFolder(tmp_path).check(parse_run_config(tree), resume=True)


def test_a_place_that_cannot_be_written_is_named(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BadConfig, match=r"^run\.out: .* cannot be written"):
        RunFolder(tmp_path / "file" / "out").claim(parse_run_config(tree))
