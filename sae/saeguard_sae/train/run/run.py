"""From a configuration to trained SAEs on disk."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from msgspec.structs import replace
from torch import Tensor

from saeguard_sae.models import Site
from saeguard_sae.train.learner import Learner, make_learner
from saeguard_sae.train.lm import LanguageModel, open_language_model
from saeguard_sae.train.parallel import ALONE, Mesh, PeerLost, own_device, together
from saeguard_sae.train.run.checkpoints import Checkpoint, Checkpoints, RunFolder, export
from saeguard_sae.train.run.config import BadConfig, RunConfig, RunFailed, RunLost, RunStopped, differences, plain
from saeguard_sae.train.run.jobs import SaePlan, Source, check_disk, check_memory, plans, rehearse_export
from saeguard_sae.train.run.metrics import (
    Console,
    MetricsFile,
    Pace,
    StepMetrics,
    TensorBoard,
    check_evaluation,
    evaluate_all,
)
from saeguard_sae.train.settings import TrainError

# Ctrl-C and SIGTERM while a run is in its loop: noted, so that the step under way is finished and saved.


class StopSignals:
    """A context; ``number`` is the signal that came, or None. A second one has its usual effect."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread may set handlers; elsewhere whoever runs us has their own way to stop.
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._note) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


# Everything that a run writes while it goes: lines, figures, checkpoints. One process of a run writes.


class Recorder(Protocol):
    """Where a run's figures and states go."""

    def note(self, text: str) -> None:
        """Something to be told."""
        ...

    def live(self, step: int, steps: int, tokens_per_s: float, left_s: float) -> None:
        """A step was done."""
        ...

    def report(self, moment: StepMetrics) -> None:
        """Figures are there."""
        ...

    def metrics_size(self) -> int:
        """Bytes of figures that are safely on disk."""
        ...

    def save(self, checkpoint: Checkpoint) -> None:
        """A state to go on from."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class WrittenRow:
    """To the folder and the console."""

    def __init__(self, folder: RunFolder, checkpoints: Checkpoints, console: Console, begun: Checkpoint | None) -> None:
        """``begun``: what the run goes on from."""
        step, size = (begun.step, begun.metrics) if begun is not None else (0, 0)
        self._checkpoints, self._console = checkpoints, console
        self._metrics = MetricsFile(folder.metrics, size)
        self._board = TensorBoard(folder.tensorboard, step)

    def note(self, text: str) -> None:
        """See ``Recorder``."""
        self._console.note(text)

    def live(self, step: int, steps: int, tokens_per_s: float, left_s: float) -> None:
        """See ``Recorder``."""
        self._console.live(step, steps, tokens_per_s, left_s)

    def report(self, moment: StepMetrics) -> None:
        """See ``Recorder``."""
        self._metrics.add(moment)
        self._board.add(moment)
        self._console.report(moment)

    def metrics_size(self) -> int:
        """See ``Recorder``."""
        return self._metrics.size()

    def save(self, checkpoint: Checkpoint) -> None:
        """See ``Recorder``."""
        self._checkpoints.save(checkpoint)

    def close(self) -> None:
        """See ``Recorder``."""
        self._console.clear()
        self._metrics.close()
        self._board.close()


class Silent:
    """Of a process that does not write."""

    def note(self, text: str) -> None:
        """See ``Recorder``."""

    def live(self, step: int, steps: int, tokens_per_s: float, left_s: float) -> None:
        """See ``Recorder``."""

    def report(self, moment: StepMetrics) -> None:
        """See ``Recorder``."""

    def metrics_size(self) -> int:
        """See ``Recorder``."""
        return 0

    def save(self, checkpoint: Checkpoint) -> None:
        """See ``Recorder``."""

    def close(self) -> None:
        """See ``Recorder``."""


# The loop: batch after batch through every learner, figures and checkpoints now and then.


class Stream(Protocol):
    """Where batches come from."""

    def batch(self) -> dict[Site, Tensor]: ...
    def state(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class SaeTrainer:
    """One SAE in the loop."""

    plan: SaePlan
    learner: Learner

    def step(self, batch: Mapping[Site, Tensor]) -> None:
        """Learns from a batch, of several processes from its part of it."""
        writes = self.plan.writes
        self.learner.step(batch[self.plan.reads], None if writes is None else batch[writes])


class TrainLoop:
    """A run between its first step, or the checkpoint it goes on from, and its last."""

    def __init__(
        self,
        config: RunConfig,
        stream: Stream,
        trainees: Sequence[SaeTrainer],
        recorder: Recorder,
        begun: Checkpoint | None,
        mesh: Mesh = ALONE,
    ) -> None:
        """``mesh``: of the processes that do the same at the same time, one of which has a recorder that writes."""
        self._config, self._stream, self._trainees, self._recorder = config, stream, trainees, recorder
        self._mesh = mesh
        self.step = 0 if begun is None else begun.step
        """Steps done."""
        self._reported = self.step
        self._pace = Pace(0.0 if begun is None else begun.elapsed_s)

    def run(self, stop: StopSignals) -> None:
        """All steps that are left.

        Raises:
            RunStopped: a signal asked for it; the state is saved.
            RunFailed: the data, memory or the disk gave out, or a loss is no longer a number.
            RunLost: another process is gone.
        """
        try:
            while self.step < self._config.steps:
                self._advance()
                self._write(stop)
        except TrainError as err:
            raise RunFailed(f"after step {self.step:,}: {err}") from err
        except PeerLost as err:
            raise RunLost(f"after step {self.step:,}: {err}") from err
        except (MemoryError, RuntimeError) as err:
            first = str(err).partition("\n")[0]
            if not isinstance(err, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in first:
                raise
            raise RunFailed(f"after step {self.step:,}: out of memory; lower d_sae or stream.batch ({first})") from err

    def _advance(self) -> None:
        batch = {site: self._mesh.rows(x) for site, x in self._stream.batch().items()}
        for trainee in self._trainees:
            trainee.step(batch)
        self.step += 1
        self._pace.add(self._config.stream.batch)

    def _write(self, stop: StopSignals) -> None:
        run, steps = self._config.run, self._config.steps
        # Read once, since it may come at any time; to several processes at different steps.
        signal = self._mesh.agreed(stop.number or 0) or None
        saves = self.step == steps or self.step % run.checkpoint_every == 0 or signal is not None
        if saves or self.step % run.log_every == 0:
            self._report()
        else:
            self._recorder.live(self.step, steps, self._pace.tokens_per_s(), self._pace.left_s(self.step, steps))
        if saves:
            self._save()
        if signal is not None:
            raise RunStopped(signal, self.step, steps)

    def _report(self) -> None:
        figures = {one.plan.name: one.learner.progress() for one in self._trainees}
        # Before anything is written: a checkpoint of a broken SAE must not push out a good one.
        for name, one in figures.items():
            if not isfinite(one.loss):
                raise RunFailed(
                    f"saes.{name}: its loss stopped being a number between steps {self._reported + 1:,} and"
                    f" {self.step:,}; lower its learning_rate, or look for odd activations at its site"
                )
        self._reported = self.step
        config = self._config
        self._recorder.report(
            StepMetrics(
                step=self.step,
                steps=config.steps,
                tokens=self.step * config.stream.batch,
                tokens_per_s=self._pace.lap(),
                elapsed_s=self._pace.elapsed_s(),
                left_s=self._pace.left_s(self.step, config.steps),
                saes=figures,
            )
        )

    def _save(self) -> None:
        if self._mesh.data > 1:
            for one in self._trainees:
                one.learner.align()
        learners = {one.plan.name: one.learner.state() for one in self._trainees}
        if not self._mesh.is_writer:
            return
        self._recorder.save(
            Checkpoint(
                step=self.step,
                config=json.dumps(plain(self._config)),
                learners=learners,
                stream=self._stream.state(),
                metrics=self._recorder.metrics_size(),
                elapsed_s=self._pace.elapsed_s(),
                rng=torch.get_rng_state(),
            )
        )


_SAMPLE_BATCHES = 4
"""Batches by which scale and mean of the activations are set before the first step."""


def train_from_config(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> list[Path]:
    """Trains every SAE of the configuration on one stream of activations; their folders.

    Where torchrun started several processes, each of them calls it; the folders are told to the one that writes.

    Args:
        resume: goes on with the run that ``run.out`` holds, from its last checkpoint; begins where it has none.
        console: where it says how it goes; by default standard error.

    Raises:
        TrainError: the configuration, the model or the data cannot be used; nothing was begun.
        RunFailed: it began and cannot go on; the message says what is kept.
        RunStopped: SIGINT or SIGTERM came; it saved itself.
        RunLost: of several processes another is gone.
    """
    console = console or Console(sys.stderr)
    folder = RunFolder(Path(config.run.out).expanduser())
    checkpoints = Checkpoints(folder.checkpoints, config.run.keep)
    device = "cpu" if config.model is None else own_device(config.model.device)
    stopped: RunStopped | None = None
    with _threads(config.run.threads):
        try:
            with together(config.parallel.shards, config.stream.batch, device, checkpoints.kept) as mesh:
                if mesh.is_writer:
                    folder.check(config, resume=resume)
                torch.manual_seed(config.run.seed)
                model = None if config.model is None else open_language_model(replace(config.model, device=device))
                check_evaluation(config, model)
                try:
                    paths = _train(config, folder, checkpoints, model, console, mesh, resume=resume)
                except RunStopped as err:
                    # All processes were told; each leaves in order.
                    paths, stopped = {}, err
        except PeerLost as err:
            raise RunLost(f"{err}; {checkpoints.kept()}") from err
        if stopped is not None:
            raise stopped
        if config.run.evaluate and model is not None and paths:
            evaluate_all(config, model, paths, console)
    return list(paths.values())


def _train(
    config: RunConfig,
    folder: RunFolder,
    checkpoints: Checkpoints,
    model: LanguageModel | None,
    console: Console,
    mesh: Mesh,
    *,
    resume: bool,
) -> dict[str, Path]:
    """The folders of the trained SAEs, by name; none in a process that does not write."""
    source = Source(config, model, mesh)
    todo = plans(config, source.widths, mesh)
    sizes = {plan.name: plan.size for plan in todo}
    check_memory(sizes, source.buffer_bytes, source.device, mesh)
    if mesh.is_writer:
        check_disk(sizes.values(), source.buffer_bytes, config.run.keep, folder.path)
    sample = source.sample(_SAMPLE_BATCHES * config.stream.batch)
    trainees = [_trainee(plan, sample, source.model_name, mesh) for plan in todo]
    begun = checkpoints.latest() if resume else None
    _check_seen(begun, mesh)
    if begun is not None:
        _restore(config, begun, source, trainees)
    recorder = _recorder(config, folder, checkpoints, console, begun) if mesh.is_writer else Silent()
    recorder.note(_headline(config, source.model_name, begun, mesh))
    try:
        with StopSignals() as stop:
            TrainLoop(config, source, trainees, recorder, begun, mesh).run(stop)
    except RunFailed as err:
        raise type(err)(f"{err}; {checkpoints.kept()}") from err
    finally:
        recorder.close()
    paths = {}
    for one in trainees:
        dictionary = one.learner.export()
        if mesh.is_writer:
            paths[one.plan.name] = export(dictionary, one.plan, config, folder, source)
    return paths


def _trainee(plan: SaePlan, sample: dict[Site, Tensor], model_name: str, mesh: Mesh) -> SaeTrainer:
    rehearse_export(plan, sample, model_name)
    wanted = None if plan.writes is None else sample[plan.writes]
    try:
        return SaeTrainer(plan, make_learner(plan.settings, sample[plan.reads], wanted, mesh=mesh))
    except ValueError as err:
        raise BadConfig(f"saes.{plan.name}: {err}") from err


def _check_seen(begun: Checkpoint | None, mesh: Mesh) -> None:
    """Whether all processes found the same checkpoint, or none."""
    if len({*mesh.told(None if begun is None else begun.step)}) > 1:
        raise BadConfig("run.out: must be a folder that every process sees; they found different checkpoints there")


def _restore(config: RunConfig, begun: Checkpoint, source: Source, trainees: Sequence[SaeTrainer]) -> None:
    if changed := differences(json.loads(begun.config), plain(config)):
        raise BadConfig(f"run.out: its checkpoint is of another configuration: {'; '.join(changed)}")
    for one in trainees:
        one.learner.load_state(begun.learners[one.plan.name])
    source.resume(begun.stream)
    torch.set_rng_state(begun.rng)


def _recorder(
    config: RunConfig, folder: RunFolder, checkpoints: Checkpoints, console: Console, begun: Checkpoint | None
) -> WrittenRow:
    folder.claim(config)
    checkpoints.discard_parts()
    return WrittenRow(folder, checkpoints, console, begun)


def _headline(config: RunConfig, model_name: str, begun: Checkpoint | None, mesh: Mesh) -> str:
    count = len(config.saes)
    what = f"{count} SAE{'s' if count > 1 else ''} of {model_name}"
    where = "" if mesh.size == 1 else f", in {mesh.size} processes"
    start = "" if begun is None else f", going on after step {begun.step:,}"
    size = f"{config.steps:,} steps of {config.stream.batch:,} tokens"
    return f"saeguard train: {what}, {size}{where}, in {config.run.out}{start}"


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch with so many threads while it lasts."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
