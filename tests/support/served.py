"""The whole server over a small random model, on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import msgspec

from saeguard_server.app import App
from saeguard_server.settings import LimitSettings, ServerSettings, Settings
from support.engines import World


@asynccontextmanager
async def serving(world: World, limits: LimitSettings | None = None, **engine: Any) -> AsyncIterator[App]:
    """The app, listening on a free port of 127.0.0.1."""
    settings = msgspec.structs.replace(
        world.settings(**engine),
        server=ServerSettings(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", log_level="error"),
        limits=limits or LimitSettings(),
    )
    async with App.build(settings) as app:
        await _serves(app)
        yield app


async def _serves(app: App) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        await asyncio.wait_for(channel.channel_ready(), 10)


async def idle(app: App) -> None:
    """Waits until no slot is held.

    Raises:
        AssertionError: one still is after four seconds.
    """
    for _ in range(400):
        if metric(app, "saeguard_running_requests") == 0 and app.engine.queued() == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("a slot is still held")


def metric(app: App, name: str, labels: Sequence[tuple[str, str]] = ()) -> float:
    """The value of one metric; 0 where it has not been counted yet."""
    return app.metrics.registry.get_sample_value(name, dict(labels)) or 0.0


@asynccontextmanager
async def serving_demo() -> AsyncIterator[App]:
    """The bundled model with its SAEs, on a free port of 127.0.0.1."""
    server = ServerSettings(listen="127.0.0.1:0", metrics_listen="", log_level="error")
    async with App.build(Settings(server=server)) as app:
        await _serves(app)
        yield app
