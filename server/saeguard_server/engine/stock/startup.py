"""The check of every SAE on the model, before anybody is served: does it fit as its files or the settings say?"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from saeguard_sae.catalogue import Quality
from saeguard_sae.check import CheckBounds, CheckReport, bounds_from, calibration_text, check_sae
from saeguard_sae.loading import LoadedSae, LoadError
from saeguard_server.engine.stock.model import LoadedModel
from saeguard_server.observe.metrics import Metrics
from saeguard_server.request import TextInput
from saeguard_server.settings import CheckSettings, SaeSettings

_log = logging.getLogger(__name__)

PASSAGE_TOKENS = 256
"""Longer passages are read in pieces of this: SAEs are trained on contexts of hundreds of tokens."""


def check_saes(
    saes: dict[str, LoadedSae], given: tuple[SaeSettings, ...], model: LoadedModel, settings: CheckSettings
) -> dict[str, LoadedSae]:
    """The SAEs with what was measured of each.

    Raises:
        LoadError: one does not hold; names the convention that is most likely wrong.
    """
    if not settings.enabled or not saes:
        return saes
    tokens = calibration(settings, model)
    return {one.name: _checked(saes[one.name], one, model, tokens) for one in given}


def calibration(settings: CheckSettings, model: LoadedModel) -> list[Tensor]:
    """Token ids [T] of the passages of the calibration text, each read on its own as a prompt would be.

    Raises:
        LoadError: the text cannot be read or holds nothing.
    """
    try:
        text = Path(settings.text).read_text(encoding="utf-8") if settings.text else calibration_text()
    except (OSError, UnicodeDecodeError) as err:
        raise LoadError(f"check.text: {err}") from err
    passages = list(_passages(text, model, settings.max_tokens))
    if not passages:
        raise LoadError(f"check.text: {settings.text} holds no text")
    largest = max(int(one.max()) for one in passages)
    if largest >= model.info.vocab_size:
        raise LoadError(f"check.text: the tokenizer gives id {largest}, the model knows {model.info.vocab_size} ids")
    return passages


def measure(sae: LoadedSae, bounds: CheckBounds, model: LoadedModel, tokens: list[Tensor]) -> CheckReport:
    """What the check finds of one SAE."""
    network = model.network
    return check_sae(network, network.config, sae, tokens, model.tokenizer.special_ids, bounds)


def bounds_of(sae: LoadedSae, given: SaeSettings) -> CheckBounds:
    """What the check must find: what the settings say, else what the SAE's files state."""
    said = CheckBounds(**{name: getattr(given.bounds, name) for name in given.bounds.__struct_fields__})
    return bounds_from(sae.catalogue.quality, sae.stated_l0, said)


def record(saes: dict[str, LoadedSae], metrics: Metrics) -> None:
    """What was measured, as metrics."""
    for name, sae in saes.items():
        found = sae.measured
        if found is None:
            continue
        for gauge, value in ((metrics.sae_l0, found.l0), (metrics.sae_fvu, found.fvu)):
            if value is not None:
                gauge.labels(name).set(value)
        if found.ce_spliced is not None and found.ce_base is not None:
            metrics.sae_ce_increase.labels(name).set(found.ce_spliced - found.ce_base)


def _checked(sae: LoadedSae, given: SaeSettings, model: LoadedModel, tokens: list[Tensor]) -> LoadedSae:
    started = time.monotonic()
    try:
        report = measure(sae, bounds_of(sae, given), model, tokens)
    except ValueError as err:
        raise LoadError(f"SAE {sae.name!r}: the check cannot be made: {err}") from err
    if report.violations:
        raise LoadError(f"SAE {sae.name!r} does not fit this model: {report.explain()}")
    found = report.measured
    facts = {"sae": sae.name, "l0": found.l0, "fvu": found.fvu, "seconds": round(time.monotonic() - started, 2)}
    _log.info("checked", extra={"fields": facts})
    for doubt in report.doubts:
        fields = {"sae": sae.name, "reading": doubt.what, "fvu": doubt.fvu, "setting": doubt.setting}
        _log.warning("an SAE is within its bounds, but another reading fits it better", extra={"fields": fields})
    return replace(sae, measured=quality_of(report))


def quality_of(report: CheckReport) -> Quality:
    """What was measured, as the catalogue holds it."""
    found = report.measured
    return Quality(
        l0=found.l0,
        fvu=found.fvu,
        ce_base=found.ce_base,
        ce_spliced=found.ce_spliced,
        dead_share=found.dead_share,
        tokens=found.tokens,
    )


def _passages(text: str, model: LoadedModel, budget: int) -> Iterator[Tensor]:
    size = min(PASSAGE_TOKENS, model.info.max_context)
    for passage in text.split("\n\n"):
        ids = model.tokenizer.encode(TextInput(passage)).ids if passage.strip() else ()
        for start in range(0, len(ids), size):
            part = ids[start : start + min(size, budget)]
            budget -= len(part)
            if len(part) > 1:
                yield torch.tensor(part, device=model.device)
