"""Builds the engine from settings: the check of the SAEs on the stock model, then vLLM with its workers' SAEs."""

from __future__ import annotations

from collections.abc import Mapping

from saeguard_sae.loading import LoadedSae, LoadError
from saeguard_sae.models import Site
from saeguard_server.engine.model_files import ModelFiles, ModelLoadError, open_files
from saeguard_server.engine.process.facts import describe
from saeguard_server.engine.stock import startup
from saeguard_server.engine.stock.model import load_model
from saeguard_server.engine.stock.saes import load_saes
from saeguard_server.engine.vllm import places, versions
from saeguard_server.engine.vllm.arguments import arguments, check_settings
from saeguard_server.engine.vllm.client import Client
from saeguard_server.engine.vllm.engine import VllmEngine
from saeguard_server.observe.metrics import Metrics
from saeguard_server.settings import BadSettings, ModelSettings, Settings


def load_engine(settings: Settings, metrics: Metrics) -> VllmEngine:
    """The engine with vLLM running, not yet taking requests.

    The stock model is loaded on the CPU first, to tie the SAEs to it and to check them, and is gone before vLLM starts;
    vLLM's workers load the SAEs again, and refuse to start with others.

    Raises:
        BadSettings: a setting that vLLM has no use for, or it is not installed, not tested, or could not start.
        ModelLoadError: the model cannot be served.
        LoadError: an SAE cannot be loaded, does not fit the model, or sits where vLLM cannot be edited.
    """
    versions.check()
    check_settings(settings)
    model = open_files(settings.model, settings.engine.max_context)
    _check_architecture(settings, model)
    sites = places.offered(model.config, settings.engine.vllm.tensor_parallel)
    saes = _checked(settings, metrics)
    _check_sites(saes, sites, settings.engine.vllm.tensor_parallel)
    given = arguments(settings, model, saes)

    def launch() -> Client:
        return Client(given, metrics)

    try:
        client = launch()
    except (RuntimeError, ValueError) as err:
        raise BadSettings(f"engine: vLLM could not start, for reasons that its log above gives ({err})") from err
    return VllmEngine(model, saes, client, launch, sites, metrics, settings.engine.max_slots)


def _check_architecture(settings: Settings, model: ModelFiles) -> None:
    kind = model.info.architecture
    if kind not in places.MODELS:
        known = ", ".join(sorted(places.MODELS))
        raise ModelLoadError(
            f"model {settings.model.path!r}: the vllm engine knows no sites in {kind} models; it does in {known}"
        )


def _checked(settings: Settings, metrics: Metrics) -> dict[str, LoadedSae]:
    """The SAEs as they were measured on the stock model, in the order of the settings, without their weights."""
    if not settings.saes:
        return {}
    given = settings.model
    on_cpu = ModelSettings(
        path=given.path, revision=given.revision, name=given.name, dtype=given.dtype, digest=given.digest
    )
    stock = load_model(on_cpu, settings.engine.max_context)
    saes = startup.check_saes(load_saes(settings.saes, stock), settings.saes, stock, settings.check)
    startup.record(saes, metrics)
    return {one.name: describe(saes[one.name]) for one in settings.saes}


def _check_sites(saes: Mapping[str, LoadedSae], sites: frozenset[Site], tensor_parallel: int) -> None:
    for sae in saes.values():
        for site in (sae.site, *sae.write_sites):
            if site not in sites:
                why = " with tensor parallelism" if tensor_parallel > 1 else ""
                raise LoadError(f"SAE {sae.name!r}: the vllm engine cannot reach {site}{why}")
