"""A configuration that trains in a second or two."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from saeguard_sae.train.run.progress import Console


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@pytest.fixture
def tree(world: Any, tmp_path: Path) -> dict[str, Any]:
    """As a TOML file would give it: 40 steps of one SAE."""
    return {
        "model": {"path": str(world.model)},
        "data": {"path": str(world.text)},
        "stream": {"batch": 64, "buffer": 1024, "context": 32},
        "run": {
            "out": str(tmp_path / "out"),
            "tokens": 64 * 40,
            "log_every": 10,
            "checkpoint_every": 20,
            "evaluate": False,
            "seed": 11,
        },
        "saes": [{"name": "mid", "site": "resid_post.1", "d_sae": 64, "k": 4, "kernels": "torch"}],
    }


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(screen: io.StringIO) -> Console:
    return Console(screen)
