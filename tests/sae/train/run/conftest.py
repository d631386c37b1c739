"""A small random model, text for it, and a configuration that trains on both in a second or two."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from saeguard_sae.train.run.console import Console
from support.models import save_model

DOCUMENTS = 150


@dataclass(frozen=True)
class World:
    """What a run needs."""

    model: Path
    text: Path


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    save_model("llama", folder / "model")
    source = random.Random(44)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 7))) for _ in range(200)]
    lines = [json.dumps({"text": " ".join(source.choices(words, k=30))}) for _ in range(DOCUMENTS)]
    text = folder / "text.jsonl"
    text.write_text("\n".join(lines), encoding="utf-8")
    return World(folder / "model", text)


@pytest.fixture
def tree(world: World, tmp_path: Path) -> dict[str, Any]:
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


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a tree as TOML."""

    def written(tree: dict[str, Any]) -> Path:
        lines: list[str] = []
        for name, table in tree.items():
            for one in table if isinstance(table, list) else [table]:
                lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
                lines += [f"{key} = {json.dumps(value)}" for key, value in one.items()]
        path = tmp_path / "config.toml"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return written
