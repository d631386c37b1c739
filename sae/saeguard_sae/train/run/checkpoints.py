"""Checkpoints: everything that a run needs to go on as if it had never stopped, each file whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import torch
from torch import Tensor

from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats import saelens_save
from saeguard_sae.train.run.config import BadConfig, RunConfig, RunFailed, differences, plain
from saeguard_sae.train.run.jobs import SaePlan, Source
from saeguard_sae.train.run.metrics import last_figures

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


# The folder of a run: what lies where, and whose it is.


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


# The card of a trained SAE: what it is, what it learnt from, how it did, how to use it.


def write_card(plan: SaePlan, config: RunConfig, model_name: str, epoch: int, figures: Mapping[str, Any]) -> str:
    """Markdown, with the header that the Hugging Face hub reads.

    Args:
        epoch: how often the data was started again.
        figures: the last line of metrics.
    """
    parts = [
        _head(plan, model_name),
        _use(plan, config),
        _data(config, epoch),
        _figures(figures, config),
        _settings(plan),
    ]
    return "\n".join(parts)


def _head(plan: SaePlan, model_name: str) -> str:
    kind = "sparse autoencoder" if plan.writes is None else "transcoder"
    place = f"the activations at `{plan.reads}`"
    if plan.writes is not None:
        place += f", of which it makes those at `{plan.writes}`"
    size = plan.size
    return f"""---
library_name: saelens
tags:
- sparse-autoencoder
- saeguard
---

# {plan.name}

A {kind} on {place} of {model_name}: {size.settings.architecture}, {size.settings.d_sae:,} features of
{size.d_in:,} dimensions. Trained by Saeguard {version("saeguard")}.
"""


def _use(plan: SaePlan, config: RunConfig) -> str:
    model = "MODEL" if config.model is None else config.model.path
    return f"""## Use

```
saeguard serve --model {model} --sae {plan.name}=THIS_FOLDER
```

SAELens loads the same folder with `SAE.load_from_disk`.
"""


def _data(config: RunConfig, epoch: int) -> str:
    tokens, stream = config.steps * config.stream.batch, config.stream
    again = f" The data was read {epoch + 1} times." if epoch else ""
    left_out = [name for name, holds in (("each row's first token", stream.mask_first),
                ("special tokens", stream.mask_special)) if holds]  # fmt: skip
    if stream.outlier_norm:
        left_out.append(f"tokens with a norm above {stream.outlier_norm:g} times the median")
    apart = (
        f" Its first {config.run.heldout:,} documents were held out, and evaluated on." if config.run.evaluate else ""
    )
    return f"""## Data

{tokens:,} tokens of `{config.data.path}`, in batches of {stream.batch:,} from a buffer of {stream.buffer:,}.{again}
Left out: {", ".join(left_out) or "nothing"}.{apart}
"""


def _figures(figures: Mapping[str, Any], config: RunConfig) -> str:
    more = "\n`evaluation/report.html` has what was measured on the held-out text.\n" if config.run.evaluate else ""
    return f"""## Figures

Means over the last steps of training, on the batches it was trained on.

| loss | L0 | FVU | dead features |
|---|---|---|---|
| {_shown(figures["loss"])} | {_shown(figures["l0"])} | {_shown(figures["fvu"])} | {_shown(figures["dead_share"])} |
{more}"""


def _settings(plan: SaePlan) -> str:
    return "\n".join(["## Settings", "", "| | |", "|---|---|", *_rows(plan), ""])


def _rows(plan: SaePlan) -> Iterator[str]:
    for one in fields(plan.settings):
        yield f"| {one.name} | {msgspec.to_builtins(getattr(plan.settings, one.name))} |"


def _shown(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"


# Trained SAEs as files: SAELens' format, which our server and SAELens load, and a card.


CARD = "README.md"


def export(dictionary: Dictionary, plan: SaePlan, config: RunConfig, folder: RunFolder, source: Source) -> Path:
    """Writes one trained SAE with its card; its folder.

    Raises:
        RunFailed: it could not be written, or holds values that are not finite.
    """
    path = folder.sae(plan.name)
    try:
        saelens_save.save_saelens(
            dictionary,
            path,
            site=plan.reads,
            model_name=source.model_name,
            metadata=_metadata(config, source),
            writes=() if plan.writes is None else (plan.writes,),
        )
        figures = last_figures(folder.metrics)[plan.name]
        part = path / f"{CARD}.part"
        part.write_text(write_card(plan, config, source.model_name, source.epoch, figures), encoding="utf-8")
        os.replace(part, path / CARD)
    except (OSError, ValueError, RuntimeError) as err:
        raise RunFailed(f"saes.{plan.name}: could not be written to {path}: {err}") from err
    return path


def _metadata(config: RunConfig, source: Source) -> dict[str, Any]:
    """What SAELens' files have a place for, and what made them."""
    known: dict[str, Any] = {
        "training_tokens": config.steps * config.stream.batch,
        "dataset_path": config.data.path,
        "saeguard_version": version("saeguard"),
    }
    if source.context is not None:
        known |= {"context_size": source.context, "prepend_bos": source.has_bos}
    return known
