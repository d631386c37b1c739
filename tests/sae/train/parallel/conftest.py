"""A configuration that several processes can train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@pytest.fixture
def tree(world: Any, tmp_path: Path) -> dict[str, Any]:
    """As a TOML file would give it: 24 steps of two SAEs."""
    return {
        "model": {"path": str(world.model)},
        "data": {"path": str(world.text)},
        "stream": {"batch": 64, "buffer": 1024, "context": 32, "rows": 4},
        "run": {
            "out": str(tmp_path / "out"),
            "tokens": 64 * 24,
            "log_every": 6,
            "checkpoint_every": 12,
            "evaluate": False,
            "seed": 11,
            "threads": 1,
        },
        "saes": [
            {"name": "mid", "site": "resid_post.1", "d_sae": 64, "k": 4, "kernels": "torch", "dead_after": 0.05},
            {"name": "jump", "site": "resid_post.0", "d_sae": 64, "architecture": "jumprelu", "sparsity": 0.5},
        ],
    }
