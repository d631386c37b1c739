"""Checkpoints: everything that a run needs to go on as if it had never stopped, each file whole or not there."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from saeguard_sae.train.run.errors import RunFailed

_FORMAT = 1
_NAME = re.compile(r"step-(\d{12})\.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state of a run after a step."""

    step: int
    config: str
    """The run's configuration, as JSON."""
    learners: Mapping[str, Mapping[str, Any]]
    """By the SAE's name."""
    stream: Mapping[str, Any]
    metrics: int
    """Bytes of the metrics file that were written by then."""
    elapsed_s: float
    """Seconds that the run had taken."""
    rng: Tensor
    """torch's own random state on the CPU."""


class Checkpoints:
    """Those of one run, in one folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        """``keep``: how many are left there, the newest."""
        self.folder = folder
        self._keep = keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes one beside the others, then takes away the oldest.

        Raises:
            RunFailed: it could not be written; those that were there are as they were.
        """
        path = self.folder / f"step-{checkpoint.step:012d}.pt"
        part = self.folder / f"{path.name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                _write(checkpoint, file)
                os.fsync(file.fileno())
            os.replace(part, path)
            _sync_folder(self.folder)
        except OSError as err:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise RunFailed(self._not_written(checkpoint.step, err)) from err
        self._forget_oldest()
        return path

    def paths(self) -> list[Path]:
        """Complete ones, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if _NAME.fullmatch(path.name))

    def latest(self) -> Checkpoint | None:
        """The newest, its tensors mapped from the file; None where there is none.

        Raises:
            RunFailed: it cannot be read.
        """
        paths = self.paths()
        return _read(paths[-1]) if paths else None

    def discard_parts(self) -> None:
        """Takes away what a killed run had begun to write."""
        for part in self.folder.glob("step-*.pt.part"):
            part.unlink()

    def kept(self) -> str:
        """For messages: what there is to go on from."""
        paths = self.paths()
        match = _NAME.fullmatch(paths[-1].name) if paths else None
        return f"the checkpoint of step {int(match[1]):,} is kept" if match else "there is no checkpoint yet"

    def _forget_oldest(self) -> None:
        for old in self.paths()[: -self._keep]:
            try:
                old.unlink()
            except OSError as err:
                raise RunFailed(f"run.out: {old} could not be deleted: {err.strerror}") from err

    def _not_written(self, step: int, err: OSError) -> str:
        reason = err.strerror or str(err)
        return f"run.out: the checkpoint of step {step:,} could not be written to {self.folder} ({reason})"


class _Sink:
    """Takes what torch writes, and remembers the first error.

    torch's writer, in C++, turns an exception from here into one that no longer says why, or ends the process.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes | memoryview) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as err:
                self.error = err
        return len(data)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._file.flush()
            except OSError as err:
                self.error = err


def _write(checkpoint: Checkpoint, file: IO[bytes]) -> None:
    sink = _Sink(file)
    content = {
        "format": _FORMAT,
        "step": checkpoint.step,
        "config": checkpoint.config,
        "learners": {name: dict(state) for name, state in checkpoint.learners.items()},
        "stream": dict(checkpoint.stream),
        "metrics": checkpoint.metrics,
        "elapsed_s": checkpoint.elapsed_s,
        "rng": checkpoint.rng,
    }
    torch.save(content, cast(IO[bytes], sink))
    sink.flush()
    if sink.error is not None:
        raise sink.error


def _read(path: Path) -> Checkpoint:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as err:
        first = str(err).partition("\n")[0]
        raise RunFailed(f"{path} cannot be read ({first}); delete it to go on from the checkpoint before it") from err
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise RunFailed(f"{path} is not a checkpoint of this version; begin anew in another folder")
    return Checkpoint(
        step=content["step"],
        config=content["config"],
        learners=content["learners"],
        stream=content["stream"],
        metrics=content["metrics"],
        elapsed_s=content["elapsed_s"],
        rng=content["rng"].clone(),
    )


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a power cut too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
