"""Which engine the settings ask for, and where it runs. Imports only that one: others need libraries of their own."""

from __future__ import annotations

from typing import Protocol

from saeguard_sae.loading import LoadError
from saeguard_sae.models import ModelLoadError
from saeguard_server.engine.protocol import Engine
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.observe import Metrics
from saeguard_server.settings import BadSettings, Settings


class LoadedEngine(Engine, Protocol):
    """An engine with the tokenizer of its model."""

    @property
    def tokenizer(self) -> Tokenizer: ...


def load_engine(settings: Settings, metrics: Metrics) -> LoadedEngine:
    """The engine that the settings ask for, loaded and checked, not started.

    Raises:
        BadSettings: it cannot be loaded; says what would help.
    """
    kind, is_apart = settings.engine.kind, settings.engine.process
    if is_apart and kind == "vllm":
        raise BadSettings("engine.process: the vllm engine runs in processes of its own already")
    try:
        if is_apart:
            from saeguard_server.engine import worker as process
            from saeguard_server.engine.transformers import load_engine as embedded

            return process.load_engine(settings, metrics, embedded)
        return _LOADERS[kind](settings, metrics)
    except (LoadError, ModelLoadError) as err:
        raise BadSettings(str(err)) from err


def _transformers(settings: Settings, metrics: Metrics) -> LoadedEngine:
    from saeguard_server.engine.transformers import load_engine as load

    return load(settings, metrics)


def _vllm(settings: Settings, metrics: Metrics) -> LoadedEngine:
    from saeguard_server.engine.vllm.engine import load_engine as load

    return load(settings, metrics)


_LOADERS = {"transformers": _transformers, "vllm": _vllm}
