"""The folder of a run: what lies where, and whose it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from saeguard_sae.train.run.config import RunConfig, differences, plain
from saeguard_sae.train.run.errors import BadConfig

_MARK = "run.json"


class RunFolder:
    """``run.json``, ``metrics.jsonl``, ``checkpoints/``, ``saes/`` and, with TensorBoard, ``tensorboard/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"

    def sae(self, name: str) -> Path:
        """Of one SAE."""
        return self.path / "saes" / name

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Looks whether this run may have the folder; writes nothing.

        Raises:
            BadConfig: it holds something else, another run, or this one without ``resume``.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise BadConfig(f"run.out: {self.path} is not a folder")
        before = self._before()
        if before is None:
            if any(one.name != f"{_MARK}.part" for one in self.path.iterdir()):
                raise BadConfig(
                    f"run.out: {self.path} holds something that is no run; name an empty folder or a new one"
                )
        elif not resume:
            raise BadConfig(
                f"run.out: {self.path} already holds a run; --resume goes on with it, or name another folder"
            )
        elif changed := differences(before, plain(config)):
            raise BadConfig(f"run.out: {self.path} holds a run of another configuration: {'; '.join(changed)}")

    def claim(self, config: RunConfig) -> None:
        """Makes it and marks it as this run's.

        Raises:
            BadConfig: it cannot be written.
        """
        part = self.path / f"{_MARK}.part"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"config": plain(config)}, indent=2) + "\n", encoding="utf-8")
            os.replace(part, self.path / _MARK)
        except OSError as err:
            raise BadConfig(f"run.out: {self.path} cannot be written: {err.strerror}") from err

    def _before(self) -> dict[str, Any] | None:
        """The configuration of the run that it holds; None where there is none."""
        mark = self.path / _MARK
        if not mark.is_file():
            return None
        try:
            config: dict[str, Any] = dict(json.loads(mark.read_text(encoding="utf-8"))["config"])
        except (ValueError, KeyError, TypeError, OSError) as err:
            raise BadConfig(f"run.out: {mark} cannot be read; name another folder") from err
        return config
