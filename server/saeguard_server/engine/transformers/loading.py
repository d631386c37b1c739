"""Builds the engine from settings: the model, its SAEs, and the check that they fit together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch._dynamo.exc import BackendCompilerFailed

from saeguard_server.engine.model_files import ModelLoadError
from saeguard_server.engine.stock import startup
from saeguard_server.engine.stock.model import LoadedModel, load_model
from saeguard_server.engine.stock.saes import load_saes
from saeguard_server.engine.transformers.blocks import BLOCK
from saeguard_server.engine.transformers.core import Core
from saeguard_server.engine.transformers.engine import TransformersEngine
from saeguard_server.engine.transformers.memory import kv_blocks
from saeguard_server.engine.transformers.network import Network
from saeguard_server.engine.transformers.warmup import warm_up
from saeguard_server.observe.metrics import Metrics
from saeguard_server.settings import Settings

SMALL = 20_000_000
"""Parameters below which a second CPU thread costs more than it gives (measured: 2.5M, 1,250 against 680 tokens/s)."""


def load_engine(settings: Settings, metrics: Metrics) -> TransformersEngine:
    """The engine with its model and SAEs loaded and checked, not started.

    Raises:
        ModelLoadError: the model cannot be served.
        LoadError: an SAE cannot be loaded, does not fit the model, or is not what its files state.
    """
    # On a thread that ends. OpenMP's workers belong to the thread that first computed; were this one left with some,
    # there would be more of them than cores, and those of the engine's thread would sleep between operations instead
    # of spinning (measured at 125M parameters, one request: 32 ms a token instead of 20).
    with ThreadPoolExecutor(1, "engine-loading") as loader:
        made = loader.submit(_load, settings, metrics).result()
        # How many it may use is this thread's own too: a graph compiled for one number is not used with another.
        torch.set_num_threads(loader.submit(torch.get_num_threads).result())
        return made


def _load(settings: Settings, metrics: Metrics) -> TransformersEngine:
    model = load_model(settings.model, settings.engine.max_context)
    _set_threads(settings.engine.threads, model)
    saes = startup.check_saes(load_saes(settings.saes, model), settings.saes, model, settings.check)
    startup.record(saes, metrics)

    engine = settings.engine
    sites = frozenset(site for sae in saes.values() for site in (sae.site, *sae.write_sites))
    blocks = kv_blocks(model, engine.max_slots, engine.kv_cache_mb)
    model = replace(model, info=replace(model.info, max_context=min(model.info.max_context, blocks * BLOCK)))
    network = Network(model, sites, compiled=engine.compile, packed=engine.pack_weights)

    def build() -> Core:
        return Core(
            model,
            network,
            saes,
            metrics,
            slots=engine.max_slots,
            prefill_tokens=engine.prefill_tokens,
            blocks=blocks,
            reuse=engine.prefix_cache,
        )

    made = TransformersEngine(build)
    if engine.compile != "none":
        _warm_up(network)
    return made


def _warm_up(network: Network) -> None:
    try:
        warm_up(network)
    except BackendCompilerFailed as err:
        first = next(iter(str(err.inner_exception).strip().splitlines()), type(err.inner_exception).__name__)
        raise ModelLoadError(
            f'engine.compile: compiling failed ({first}); is a C++ compiler there? "none" needs none'
        ) from err


def _set_threads(threads: int | None, model: LoadedModel) -> None:
    """The process's torch threads; one for a small model, whose layers are over before a second thread has begun."""
    if threads is None and sum(one.numel() for one in model.network.parameters()) < SMALL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
