"""Turns requests into tokens. One package per engine, behind the protocol in ``protocol``; the settings choose."""

from __future__ import annotations

from saeguard_sae.loading import LoadError
from saeguard_sae.models import ModelLoadError
from saeguard_server.engine.protocol import Engine
from saeguard_server.observe import Metrics
from saeguard_server.settings import BadSettings, Settings


def load_engine(settings: Settings, metrics: Metrics) -> Engine:
    """The engine that the settings ask for, loaded and checked, not started, no other imported; raises BadSettings."""
    kind, is_apart = settings.engine.kind, settings.engine.process
    if is_apart and kind == "vllm":
        raise BadSettings("engine.process: the vllm engine runs in processes of its own already")
    try:
        if kind == "vllm":
            from saeguard_server.engine.vllm.engine import load_engine as load_vllm

            return load_vllm(settings, metrics)
        from saeguard_server.engine.transformers import load_engine as load_transformers

        if is_apart:
            from saeguard_server.engine.worker import load_engine as load_worker

            return load_worker(settings, metrics, load_transformers)
        return load_transformers(settings, metrics)
    except (LoadError, ModelLoadError) as err:
        raise BadSettings(str(err)) from err
