"""From a configuration to trained SAEs on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from saeguard_sae.site import Site
from saeguard_sae.train.learner import make_learner
from saeguard_sae.train.lm import LanguageModel, open_model
from saeguard_sae.train.run.checkpoints import Checkpoint, Checkpoints
from saeguard_sae.train.run.config import RunConfig, differences, plain
from saeguard_sae.train.run.console import Console
from saeguard_sae.train.run.errors import BadConfig, RunFailed
from saeguard_sae.train.run.estimate import check_disk, check_memory
from saeguard_sae.train.run.evaluation import check_evaluation, evaluate_all
from saeguard_sae.train.run.export import export
from saeguard_sae.train.run.folder import RunFolder
from saeguard_sae.train.run.loop import Loop, Trainee
from saeguard_sae.train.run.plans import Plan, plans, rehearse_export
from saeguard_sae.train.run.recorder import Written
from saeguard_sae.train.run.source import Source
from saeguard_sae.train.run.stopping import StopSignals

_SAMPLE_BATCHES = 4
"""Batches by which scale and mean of the activations are set before the first step."""


def train_from_config(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> list[Path]:
    """Trains every SAE of the configuration on one stream of activations; their folders.

    Args:
        resume: goes on with the run that ``run.out`` holds, from its last checkpoint; begins where it has none.
        console: where it says how it goes; by default standard error.

    Raises:
        TrainError: the configuration, the model or the data cannot be used; nothing was begun.
        RunFailed: it began and cannot go on; the message says what is kept.
        RunStopped: SIGINT or SIGTERM came; it saved itself.
    """
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        raise BadConfig("a run is one process: torchrun would start the same one several times, in one folder")
    console = console or Console(sys.stderr)
    folder = RunFolder(Path(config.run.out).expanduser())
    folder.check(config, resume=resume)
    with _threads(config.run.threads):
        torch.manual_seed(config.run.seed)
        model = None if config.model is None else open_model(config.model)
        check_evaluation(config, model)
        paths = _train(config, folder, model, console, resume=resume)
        if config.run.evaluate and model is not None:
            evaluate_all(config, model, paths, console)
    return list(paths.values())


def _train(
    config: RunConfig, folder: RunFolder, model: LanguageModel | None, console: Console, *, resume: bool
) -> dict[str, Path]:
    """The folders of the trained SAEs, by name."""
    source = Source(config, model)
    todo = plans(config, source.widths)
    sizes = {plan.name: plan.size for plan in todo}
    check_memory(sizes, source.buffer_bytes, source.device)
    check_disk(sizes.values(), source.buffer_bytes, config.run.keep, folder.path)
    sample = source.sample(_SAMPLE_BATCHES * config.stream.batch)
    trainees = [_trainee(plan, sample, source.model_name) for plan in todo]
    checkpoints = Checkpoints(folder.checkpoints, config.run.keep)
    begun = checkpoints.latest() if resume else None
    if begun is not None:
        _restore(config, begun, source, trainees)
    recorder = _recorder(config, folder, checkpoints, console, begun)
    recorder.note(_headline(config, source.model_name, begun))
    try:
        with StopSignals() as stop:
            Loop(config, source, trainees, recorder, begun).run(stop)
    except RunFailed as err:
        raise RunFailed(f"{err}; {checkpoints.kept()}") from err
    finally:
        recorder.close()
    return {one.plan.name: export(one, config, folder, source) for one in trainees}


def _trainee(plan: Plan, sample: dict[Site, Tensor], model_name: str) -> Trainee:
    rehearse_export(plan, sample, model_name)
    wanted = None if plan.writes is None else sample[plan.writes]
    try:
        return Trainee(plan, make_learner(plan.settings, sample[plan.reads], wanted))
    except ValueError as err:
        raise BadConfig(f"saes.{plan.name}: {err}") from err


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


def _headline(config: RunConfig, model_name: str, begun: Checkpoint | None) -> str:
    count = len(config.saes)
    what = f"{count} SAE{'s' if count > 1 else ''} of {model_name}"
    start = "" if begun is None else f", going on after step {begun.step:,}"
    return (
        f"saeguard train: {what}, {config.steps:,} steps of {config.stream.batch:,} tokens, in {config.run.out}{start}"
    )


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
