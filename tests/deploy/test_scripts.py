"""The image check is a script that bash and Python can read; running it needs root and container tools."""

from __future__ import annotations

import os
import py_compile
import re
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script(deploy: Path) -> Path:
    return deploy / "check_image.sh"


def test_bash_reads_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_can_be_run_and_stops_at_the_first_surprise(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert re.search(r"^set -euo pipefail$", script.read_text(), re.MULTILINE)


def test_it_runs_the_container_as_confined_as_promised(script: Path) -> None:
    text = script.read_text()
    for option in ("--read-only ", "--read-only-tmpfs=false", "--tmpfs /tmp", "--cap-drop ALL", "no-new-privileges"):
        assert option in text


def test_it_asks_only_questions_that_exist(script: Path, deploy: Path, tmp_path: Path) -> None:
    questions = deploy / "check_requests.py"
    py_compile.compile(str(questions), cfile=str(tmp_path / "check_requests.pyc"), doraise=True)
    asked = re.findall(r" asks (\w+) ", script.read_text())
    assert len(asked) >= 3
    assert all(f"def {question}(" in questions.read_text() for question in asked)
