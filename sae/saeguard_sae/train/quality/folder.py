"""Evaluates an SAE on disk: loads it, ties it to the model, measures, writes the report."""

from __future__ import annotations

from pathlib import Path

from saeguard_sae.binding import Overrides, bind
from saeguard_sae.loading import LoadedSae, LoadError, open_sae
from saeguard_sae.site import Site
from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.quality.evaluate import Material, Progress, evaluate
from saeguard_sae.train.quality.evaluation import Evaluation
from saeguard_sae.train.quality.probes import read_labelled
from saeguard_sae.train.quality.report import write
from saeguard_sae.train.quality.settings import EvaluateSettings
from saeguard_sae.train.quality.texts import labelled_rows, text_rows
from saeguard_sae.train.stream_settings import DataSettings, StreamSettings
from saeguard_sae.train.tokens import context_length


def evaluate_folder(
    path: Path,
    model: LanguageModel,
    data: DataSettings,
    stream: StreamSettings,
    out: Path,
    *,
    settings: EvaluateSettings | None = None,
    site: Site | None = None,
    other: Path | None = None,
    probe: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The evaluation of the SAE in ``path``; ``evaluation.json``, ``report.html`` and PNGs in ``out``.

    Args:
        data: text that should not have trained the SAE.
        stream: how it becomes rows; its outlier norm and masks hold here too.
        site: where the SAE reads, where its files do not say.
        other: an SAE to compare directions with.
        probe: JSONL of labelled texts.

    Raises:
        TrainError: a file or setting that cannot be used; the message names it.
    """
    settings = settings or EvaluateSettings(outlier_norm=stream.outlier_norm)
    sae = _opened(path, model, site, "sae")
    far = None if other is None else _opened(other, model, site, "other")
    _make(out)
    labelled = [] if probe is None else read_labelled(probe)
    material = Material(
        model=model.network,
        name=model.name,
        rows=text_rows(model, data, stream),
        source=data.path,
        decode=lambda ids: str(model.tokenizer.decode(ids)),
        labelled=labelled_rows(model, labelled, context_length(model, stream)),
    )
    found = evaluate(sae, material, settings, other=far, progress=progress)
    try:
        write(found, out)
    except OSError as err:
        raise TrainError(f"out: {out} cannot be written: {err.strerror}") from err
    return found


def _make(out: Path) -> None:
    """Now, not after hours of measuring."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise TrainError(f"out: {out} cannot be made: {err.strerror}") from err


def _opened(path: Path, model: LanguageModel, site: Site | None, field: str) -> LoadedSae:
    try:
        # Its last two folders tell the SAEs of a run apart.
        name = "/".join(path.resolve().parts[-2:])
        return bind(open_sae(name, path), model.network, model.config, Overrides(site=site))
    except LoadError as err:
        raise TrainError(f"{field}: {err}") from err
