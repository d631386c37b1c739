"""From a configuration to trained SAEs on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from saeguard_sae.site import Site
from saeguard_sae.train.learner import make_learner
from saeguard_sae.train.lm import LanguageModel, open_model
from saeguard_sae.train.parallel.joining import own_device, together
from saeguard_sae.train.parallel.mesh import Mesh, PeerLost
from saeguard_sae.train.run.checkpoints import Checkpoint, Checkpoints
from saeguard_sae.train.run.config import RunConfig, differences, plain
from saeguard_sae.train.run.console import Console
from saeguard_sae.train.run.errors import BadConfig, RunFailed, RunLost, RunStopped
from saeguard_sae.train.run.estimate import check_disk, check_memory
from saeguard_sae.train.run.evaluation import check_evaluation, evaluate_all
from saeguard_sae.train.run.export import export
from saeguard_sae.train.run.folder import RunFolder
from saeguard_sae.train.run.loop import Loop, Trainee
from saeguard_sae.train.run.plans import Plan, plans, rehearse_export
from saeguard_sae.train.run.recorder import Silent, Written
from saeguard_sae.train.run.source import Source
from saeguard_sae.train.run.stopping import StopSignals

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
                model = None if config.model is None else open_model(replace(config.model, device=device))
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
            Loop(config, source, trainees, recorder, begun, mesh).run(stop)
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


def _trainee(plan: Plan, sample: dict[Site, Tensor], model_name: str, mesh: Mesh) -> Trainee:
    rehearse_export(plan, sample, model_name)
    wanted = None if plan.writes is None else sample[plan.writes]
    try:
        return Trainee(plan, make_learner(plan.settings, sample[plan.reads], wanted, mesh=mesh))
    except ValueError as err:
        raise BadConfig(f"saes.{plan.name}: {err}") from err


def _check_seen(begun: Checkpoint | None, mesh: Mesh) -> None:
    """Whether all processes found the same checkpoint, or none."""
    if len({*mesh.told(None if begun is None else begun.step)}) > 1:
        raise BadConfig("run.out: must be a folder that every process sees; they found different checkpoints there")


def _restore(config: RunConfig, begun: Checkpoint, source: Source, trainees: Sequence[Trainee]) -> None:
    if changed := differences(json.loads(begun.config), plain(config)):
        raise BadConfig(f"run.out: its checkpoint is of another configuration: {'; '.join(changed)}")
    for one in trainees:
        one.learner.load_state(begun.learners[one.plan.name])
    source.resume(begun.stream)
    torch.set_rng_state(begun.rng)


def _recorder(
    config: RunConfig, folder: RunFolder, checkpoints: Checkpoints, console: Console, begun: Checkpoint | None
) -> Written:
    folder.claim(config)
    checkpoints.discard_parts()
    return Written(folder, checkpoints, console, begun)


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
