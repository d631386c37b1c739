"""The loop: batch after batch through every learner, figures and checkpoints now and then."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from saeguard_sae.site import Site
from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.learner import Learner
from saeguard_sae.train.parallel.mesh import ALONE, Mesh, PeerLost
from saeguard_sae.train.run.checkpoints import Checkpoint
from saeguard_sae.train.run.config import RunConfig, plain
from saeguard_sae.train.run.errors import RunFailed, RunLost, RunStopped
from saeguard_sae.train.run.metrics import Moment
from saeguard_sae.train.run.pace import Pace
from saeguard_sae.train.run.plans import Plan
from saeguard_sae.train.run.recorder import Recorder
from saeguard_sae.train.run.stopping import StopSignals


class Stream(Protocol):
    """Where batches come from."""

    def batch(self) -> dict[Site, Tensor]: ...
    def state(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Trainee:
    """One SAE in the loop."""

    plan: Plan
    learner: Learner

    def step(self, batch: Mapping[Site, Tensor]) -> None:
        """Learns from a batch, of several processes from its part of it."""
        writes = self.plan.writes
        self.learner.step(batch[self.plan.reads], None if writes is None else batch[writes])


class Loop:
    """A run between its first step, or the checkpoint it goes on from, and its last."""

    def __init__(
        self,
        config: RunConfig,
        stream: Stream,
        trainees: Sequence[Trainee],
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
            Moment(
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
