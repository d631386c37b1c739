"""Evaluation at the end of a run, on the documents that were held out. What it needs is looked at before the run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.run.config import RunConfig
from saeguard_sae.train.run.console import Console
from saeguard_sae.train.run.entries import SaeEntry
from saeguard_sae.train.run.errors import BadConfig, RunFailed
from saeguard_sae.train.sources import kind

FOLDER = "evaluation"
"""In the SAE's."""
_FEWEST_ROWS = 2


def check_evaluation(config: RunConfig, model: LanguageModel | None) -> None:
    """Whether the SAEs can be evaluated when they are trained, where that is asked for.

    Raises:
        BadConfig: packages or held-out text are missing.
    """
    if not config.run.evaluate:
        return
    off = 'run.evaluate = false leaves it to "saeguard evaluate"'
    if model is None or kind(config.data) == "activations":
        raise BadConfig(f"run.evaluate: cached activations hold no text to evaluate on; {off}")
    try:
        from saeguard_sae.train.quality.folder import evaluate_folder  # noqa: F401
        from saeguard_sae.train.quality.texts import text_rows
    except ImportError as err:
        raise BadConfig(f"run.evaluate: needs packages that are not installed ({err}); {off}") from err
    try:
        rows = len(list(islice(text_rows(model, config.heldout_data, config.stream), _FEWEST_ROWS)))
    except TrainError as err:
        raise BadConfig(f"run.heldout: {err}; {off}") from err
    if rows < _FEWEST_ROWS:
        raise BadConfig(f"run.heldout: {config.run.heldout} documents are too little text to evaluate on; {off}")


def evaluate_all(config: RunConfig, model: LanguageModel, paths: Mapping[str, Path], console: Console) -> None:
    """Evaluates every SAE of a run, those that differ by their seed alone against each other.

    Raises:
        RunFailed: some could not be; all others were.
    """
    from saeguard_sae.train.quality.folder import evaluate_folder
    from saeguard_sae.train.quality.rows import summary

    failed = []
    for entry in config.saes:
        out = paths[entry.name] / FOLDER
        other = _other_seed(entry, config)
        console.note(f"saeguard train: evaluating {entry.name} on the held-out text")
        try:
            found = evaluate_folder(
                paths[entry.name],
                model,
                config.heldout_data,
                config.stream,
                out,
                other=None if other is None else paths[other],
            )
        except TrainError as err:
            failed.append(f"{entry.name}: {err}")
            continue
        console.note(f"  {summary(found)} Report: {out / 'report.html'}")
    if failed:
        raise RunFailed(f"the SAEs are trained and written, but not all could be evaluated: {'; '.join(failed)}")


def _other_seed(entry: SaeEntry, config: RunConfig) -> str | None:
    """The first SAE that is like this one but for its seed."""
    return next(
        (one.name for one in config.saes if one.name != entry.name and _but_seed(one) == _but_seed(entry)), None
    )


def _but_seed(entry: SaeEntry) -> tuple[object, ...]:
    settings = {name: value for name, value in entry.settings.items() if name != "seed"}
    return entry.site, entry.write_site, entry.expansion, settings
