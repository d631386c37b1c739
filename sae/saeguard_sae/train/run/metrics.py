"""Figures of a run on disk: ``metrics.jsonl`` always, TensorBoard where it is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from saeguard_sae.train.run.errors import RunFailed

_WRITERS = ("torch.utils.tensorboard", "tensorboardX")


class Figures(Protocol):
    """What a learner says of its last steps."""

    @property
    def loss(self) -> float: ...
    @property
    def l0(self) -> float: ...
    @property
    def fvu(self) -> float: ...
    @property
    def dead_share(self) -> float: ...
    @property
    def learning_rate(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where a run is, and how every SAE is doing."""

    step: int
    steps: int
    tokens: int
    """Since the run began."""
    tokens_per_s: float
    """Since the last moment."""
    elapsed_s: float
    """Since the run began, pauses left out."""
    left_s: float
    """Until it ends, as it looks."""
    saes: Mapping[str, Figures]

    def lines(self) -> Iterator[dict[str, Any]]:
        """A table of plain values for each SAE. What is not finite is None: JSON has no word for it."""
        for name, one in self.saes.items():
            figures = {
                "loss": one.loss,
                "l0": one.l0,
                "fvu": one.fvu,
                "dead_share": one.dead_share,
                "learning_rate": one.learning_rate,
                "tokens_per_s": round(self.tokens_per_s, 1),
                "elapsed_s": round(self.elapsed_s, 3),
            }
            finite = {key: value if isfinite(value) else None for key, value in figures.items()}
            yield {"step": self.step, "tokens": self.tokens, "sae": name, **finite}


class MetricsFile:
    """One JSON object a line for each SAE and moment."""

    def __init__(self, path: Path, size: int) -> None:
        """``size``: bytes that belong to the run so far; what a killed run wrote after its checkpoint is cut off.

        Raises:
            RunFailed: it cannot be opened.
        """
        self._path = path
        try:
            self._file = path.open("ab")
            if path.stat().st_size > size:
                self._file.truncate(size)
        except OSError as err:
            raise self._failed(err) from err

    def add(self, moment: Moment) -> None:
        """Appends.

        Raises:
            RunFailed: it could not be written.
        """
        try:
            for line in moment.lines():
                self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as err:
            raise self._failed(err) from err

    def size(self) -> int:
        """Bytes, all of them on the disk by then.

        Raises:
            RunFailed: they could not be written.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size
        except OSError as err:
            raise self._failed(err) from err

    def close(self) -> None:
        """Ends it; what could not be written was said when it was tried."""
        with suppress(OSError):
            self._file.close()

    def _failed(self, err: OSError) -> RunFailed:
        return RunFailed(f"run.out: {self._path} could not be written: {err.strerror}")


class TensorBoard:
    """The same figures as scalars, by name of the SAE; nothing where no writer is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        """``step``: what was written of later steps is left out of the charts."""
        self._writer = _writer(folder, step)

    def add(self, moment: Moment) -> None:
        """Writes."""
        if self._writer is None:
            return
        for line in moment.lines():
            name = line.pop("sae")
            for key, value in line.items():
                if key != "step" and value is not None:
                    self._writer.add_scalar(f"{name}/{key}", value, moment.step)
        self._writer.flush()

    def close(self) -> None:
        """Ends it."""
        if self._writer is not None:
            self._writer.close()


def _writer(folder: Path, step: int) -> Any:
    for name in _WRITERS:
        try:
            module = import_module(name)
        except ImportError:
            continue
        return module.SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    return None


def last_figures(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of every SAE, by its name."""
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {line["sae"]: line for line in lines}
