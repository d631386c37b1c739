"""Builds the engine from settings: the model, its SAEs, and the check that they fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from saeguard_sae.architectures import sites
from saeguard_sae.loading import LoadedSae, LoadError, load
from saeguard_sae.site import Site
from saeguard_server.engine.transformers.core import Core
from saeguard_server.engine.transformers.engine import TransformersEngine
from saeguard_server.engine.transformers.model import LoadedModel, load_model
from saeguard_server.engine.transformers.steering import measure_widths
from saeguard_server.observe.metrics import Metrics
from saeguard_server.settings import SaeSettings, Settings

SMALL = 20_000_000
"""Parameters below which a second CPU thread costs more than it gives (measured: 2.5M, 1,250 against 680 tokens/s)."""


def load_engine(settings: Settings, metrics: Metrics) -> TransformersEngine:
    """The engine with its model and SAEs loaded and checked, not started.

    Raises:
        ModelLoadError: the model cannot be served.
        LoadError: an SAE cannot be loaded, or does not fit the model.
    """
    model = load_model(settings.model, settings.engine.max_context)
    _set_threads(settings.engine.threads, model)
    saes = load_saes(settings.saes, model)

    def build() -> Core:
        return Core(
            model, saes, metrics, slots=settings.engine.max_slots, prefill_tokens=settings.engine.prefill_tokens
        )

    return TransformersEngine(build)


def _set_threads(threads: int | None, model: LoadedModel) -> None:
    """The process's torch threads; one for a small model, whose layers are over before a second thread has begun."""
    if threads is None and sum(one.numel() for one in model.network.parameters()) < SMALL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def load_saes(settings: tuple[SaeSettings, ...], model: LoadedModel) -> dict[str, LoadedSae]:
    """The SAEs by name, on the model's device.

    Raises:
        LoadError: one cannot be loaded, names a site that the model lacks, or has another width.
    """
    saes = {one.name: _load(one, model) for one in settings}
    _check_widths(model, saes)
    return saes


def _load(settings: SaeSettings, model: LoadedModel) -> LoadedSae:
    try:
        site = Site.parse(settings.site) if settings.site is not None else None
    except ValueError as err:
        raise LoadError(f"SAE {settings.name!r}: site: {err}") from err
    sae = load(settings.name, Path(settings.path), site)
    if sae.site not in sites(model.network.config):
        raise LoadError(f"SAE {settings.name!r}: {sae.site} is not a site of this {model.info.architecture} model")
    return replace(sae, dictionary=sae.dictionary.to(model.device))


def _check_widths(model: LoadedModel, saes: dict[str, LoadedSae]) -> None:
    """Reads one token and compares every site's width with its SAEs'."""
    used = {sae.site for sae in saes.values()}
    widths = measure_widths(model.network, model.network.config, used, model.device)
    for sae in saes.values():
        width, d_in = widths[sae.site], sae.dictionary.d_in
        if width != d_in:
            raise LoadError(f"SAE {sae.name!r} has d_in {d_in}, but {sae.site} of this model is {width} wide")
