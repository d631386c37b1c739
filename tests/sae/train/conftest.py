"""A small random model and text for it, and writing a configuration to a file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.models import save_model

DOCUMENTS = 150


@dataclass(frozen=True)
class World:
    """What a run needs."""

    model: Path
    text: Path


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
