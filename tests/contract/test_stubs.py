"""The committed stubs are what the generator makes of the .proto files, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_stubs_are_fresh(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([ROOT / "proto" / "generate.sh", tmp_path], check=True, env=environment, capture_output=True)
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*_pb2*")}
    committed = {
        path.relative_to(ROOT / "proto") for path in (ROOT / "proto").rglob("*_pb2*.py*") if path.suffix != ".pyc"
    }
    assert len(made) >= 20
    assert made.keys() == committed
    stale = [str(name) for name, path in made.items() if path.read_bytes() != (ROOT / "proto" / name).read_bytes()]
    assert not stale, f"run `make stubs`: {stale}"
