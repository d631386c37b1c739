"""ServerInfo: what this server is and what it allows, so that a caller need not find out by being refused."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from saeguard_server.engine.protocol import Engine
from saeguard_server.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits that a caller can run into; names as on the wire."""

    max_slots: int
    max_queue: int
    max_context: int
    max_interventions: int
    max_watch: int
    default_max_new_tokens: int
    max_deadline_s: float
    max_activation_inputs: int
    max_triggers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What GetServerInfo says."""

    version: str
    engine: str
    model: str
    limits: Limits
    intervention_kinds: tuple[str, ...]
    conditions: bool
    """Whether the engine decides conditions."""


def describe(engine: Engine, settings: Settings) -> ServerInfo:
    """The facts, which do not change while the server runs."""
    limits = settings.limits
    return ServerInfo(
        version=version("saeguard"),
        engine=engine.capabilities.engine,
        model=engine.model.name,
        limits=Limits(
            max_slots=settings.engine.max_slots,
            max_queue=limits.max_queue,
            max_context=engine.model.max_context,
            max_interventions=limits.max_interventions,
            max_watch=limits.max_watch,
            default_max_new_tokens=limits.default_max_new_tokens,
            max_deadline_s=limits.max_deadline_s,
            max_activation_inputs=limits.max_activation_inputs,
            max_triggers=limits.max_triggers,
        ),
        intervention_kinds=tuple(sorted(engine.capabilities.kinds)),
        conditions=engine.capabilities.conditions,
    )
