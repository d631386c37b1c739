"""What is known of a model from its files alone, without its weights: the same for every engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from saeguard.catalog import Model
from saeguard_sae.check import CheckBounds, CheckReport, bounds_from, calibration_text, check_sae
from saeguard_sae.loading import LoadedSae, LoadError, bind, weights_digest, with_settings
from saeguard_sae.models import (
    ModelConfig,
    ModelFolder,
    ModelLoadError,
    Site,
    hooked,
    open_folder,
    open_model,
    torch_dtype,
)
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.observe import Metrics
from saeguard_server.settings import CheckSettings, ModelSettings, ServedSaeSettings
from saeguard_server.sources import open_sae_source


@dataclass(frozen=True, slots=True, eq=False)
class ModelFiles:
    """A Hugging Face model before its weights are read, and what callers see of it."""

    folder: ModelFolder
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    info: Model


def open_files(settings: ModelSettings, max_context: int) -> ModelFiles:
    """The files of the model that the settings name, fetched from the hub where it is no local folder.

    Args:
        max_context: of the engine; the model's own limit holds where it is smaller.

    Raises:
        ModelLoadError: no such model, another digest than the settings ask for, an unknown architecture, no fast
            tokenizer.
    """
    folder = open_folder(settings.path, settings.revision)
    digest = weights_digest(folder.files)
    if settings.digest is not None and settings.digest != digest:
        raise ModelLoadError(
            f"model {settings.path!r}: model.digest: its files have {digest}, the settings ask for {settings.digest}"
        )
    config = folder.config
    tokenizer = Tokenizer(folder.tokenizer, config.vocab_size)
    info = Model(
        name=settings.name or Path(settings.path).name,
        architecture=config.model_type,
        digest=digest,
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        max_context=min(max_context, config.max_position_embeddings),
        dtype=settings.dtype,
        has_chat_template=tokenizer.has_chat_template,
    )
    return ModelFiles(folder, tokenizer, _eos_ids(settings.path, folder), info)


def _eos_ids(path: str, folder: ModelFolder) -> frozenset[int]:
    ids = None
    if (folder.path / "generation_config.json").is_file():
        try:
            ids = GenerationConfig.from_pretrained(folder.path).eos_token_id
        except (ValueError, OSError) as err:
            raise ModelLoadError(f"model {path!r}: {err}") from err
    if ids is None:
        ids = folder.config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A Hugging Face causal language model with its tokenizer."""

    network: Any
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    info: Model
    device: torch.device


def load_model(settings: ModelSettings, max_context: int) -> LoadedModel:
    """Loads the model that the settings name.

    Args:
        max_context: of the engine; the model's own limit holds where it is smaller.

    Raises:
        ModelLoadError: no such model, an unknown architecture, no fast tokenizer, weights not in safetensors.
    """
    files = open_files(settings, max_context)
    network = open_model(files.folder, settings.dtype, settings.device)
    return LoadedModel(network, files.tokenizer, files.eos_ids, files.info, torch.device(settings.device))


# SAEs tied to the sites of a loaded model: where they read and write there, and whether they fit.


def load_saes(settings: tuple[ServedSaeSettings, ...], model: LoadedModel) -> dict[str, LoadedSae]:
    """The SAEs by name, on the model's device.

    Raises:
        LoadError: one cannot be loaded, names a site that the model lacks, or has another width.
    """
    saes = {one.name: load_served_sae(one, model) for one in settings}
    _check_widths(model, saes)
    return saes


def load_served_sae(settings: ServedSaeSettings, model: LoadedModel) -> LoadedSae:
    """One SAE as the settings ask for it, at its sites in this model; its width is not yet compared.

    Raises:
        LoadError: it cannot be loaded, or names a site that the model lacks.
    """
    source = open_sae_source(settings)
    sae = bind(source.sae, model.network, model.network.config, source.overrides)
    own = {} if settings.dtype == "float32" else {"dtype": settings.dtype}
    moved = sae.dictionary.to(model.device, torch_dtype(settings.dtype))
    return replace(sae, dictionary=moved, digest=with_settings(sae.digest, own))


def _check_widths(model: LoadedModel, saes: dict[str, LoadedSae]) -> None:
    """Reads one token and compares every site's width with its SAEs'."""
    used = {site for sae in saes.values() for site in (sae.site, *sae.write_sites)}
    widths = measure_widths(model.network, model.network.config, used, model.device)
    for sae in saes.values():
        sizes = [(sae.site, "d_in", sae.dictionary.d_in)]
        sizes += [(site, "d_out", sae.write_width) for site in sae.writes]
        for site, name, size in sizes:
            if widths[site] != size:
                raise LoadError(f"SAE {sae.name!r} has {name} {size}, but {site} of this model is {widths[site]} wide")


def measure_widths(
    model: nn.Module, config: ModelConfig, sites: Iterable[Site], device: torch.device
) -> dict[Site, int]:
    """How wide the activations at these sites are, found by reading one token."""
    widths: dict[Site, int] = {}

    def measure(site: Site, x: Tensor, _: Tensor) -> None:
        widths[site] = x.shape[-1]

    with hooked(model, config, sites, measure), torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    return widths


# The check of every SAE on the model, before anybody is served: does it fit as its files or the settings say?


_log = logging.getLogger(__name__)

PASSAGE_TOKENS = 256
"""Longer passages are read in pieces of this: SAEs are trained on contexts of hundreds of tokens."""


def check_saes(
    saes: dict[str, LoadedSae], given: tuple[ServedSaeSettings, ...], model: LoadedModel, settings: CheckSettings
) -> dict[str, LoadedSae]:
    """The SAEs with what was measured of each.

    Raises:
        LoadError: one does not hold; names the convention that is most likely wrong.
    """
    if not settings.enabled or not saes:
        return saes
    tokens = calibration_tokens(settings, model)
    return {one.name: _checked(saes[one.name], one, model, tokens) for one in given}


def calibration_tokens(settings: CheckSettings, model: LoadedModel) -> list[Tensor]:
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


def measure_served_sae(sae: LoadedSae, bounds: CheckBounds, model: LoadedModel, tokens: list[Tensor]) -> CheckReport:
    """What the check finds of one SAE."""
    network = model.network
    return check_sae(network, network.config, sae, tokens, model.tokenizer.special_ids, bounds)


def bounds_of(sae: LoadedSae, given: ServedSaeSettings) -> CheckBounds:
    """What the check must find: what the settings say, else what the SAE's files state."""
    said = CheckBounds(**{name: getattr(given.bounds, name) for name in given.bounds.__struct_fields__})
    return bounds_from(sae.catalogue.quality, sae.stated_l0, said)


def record_checks(saes: dict[str, LoadedSae], metrics: Metrics) -> None:
    """What was measured, as metrics."""
    for name, sae in saes.items():
        found = sae.measured
        if found is None:
            continue
        for gauge, value in ((metrics.sae_l0, found.l0), (metrics.sae_fvu, found.fvu)):
            if value is not None:
                gauge.labels(name).set(value)
        if found.ce_increase is not None:
            metrics.sae_ce_increase.labels(name).set(found.ce_increase)


def _checked(sae: LoadedSae, given: ServedSaeSettings, model: LoadedModel, tokens: list[Tensor]) -> LoadedSae:
    started = time.monotonic()
    try:
        report = measure_served_sae(sae, bounds_of(sae, given), model, tokens)
    except ValueError as err:
        raise LoadError(f"SAE {sae.name!r}: the check cannot be made: {err}") from err
    if report.violations:
        raise LoadError(f"SAE {sae.name!r} does not fit this model: {report.explain()}")
    found = report.measured
    facts = {"sae": sae.name, "l0": found.l0, "fvu": found.fvu, "seconds": round(time.monotonic() - started, 2)}
    _log.info("checked", extra={"fields": facts})
    for warning in report.warnings:
        fields = {"sae": sae.name, "reading": warning.what, "fvu": warning.fvu, "setting": warning.setting}
        _log.warning("an SAE is within its bounds, but another reading fits it better", extra={"fields": fields})
    return replace(sae, measured=report.measured)


def _passages(text: str, model: LoadedModel, budget: int) -> Iterator[Tensor]:
    size = min(PASSAGE_TOKENS, model.info.max_context)
    for passage in text.split("\n\n"):
        ids = model.tokenizer.encode(passage).ids if passage.strip() else ()
        for start in range(0, len(ids), size):
            part = ids[start : start + min(size, budget)]
            budget -= len(part)
            if len(part) > 1:
                yield torch.tensor(part, device=model.device)


# When an engine that failed may start again.


FIRST_S, LONGEST_S = 0.5, 30.0
GOOD_SERVICE_S = 60.0
"""An engine that ran this long has recovered."""


class Backoff:
    """Waits before each start: none before the first, then half a second, doubled each time, up to half a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._started: float | None = None

    def started(self) -> None:
        """Notes that it serves again."""
        self._started = self._clock()

    def failed(self) -> float:
        """Notes a failure, of a running engine or of a start -> seconds to wait before the next start."""
        if self._started is not None and self._clock() - self._started >= GOOD_SERVICE_S:
            self._failures = 0
        self._failures, self._started = self._failures + 1, None
        doublings = min(self._failures - 2, 10)  # 2 ** n overflows a float at last
        return 0.0 if self._failures == 1 else min(FIRST_S * 2.0**doublings, LONGEST_S)
