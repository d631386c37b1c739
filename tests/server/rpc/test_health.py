"""Health by itself: every watcher hears every change, whoever else comes and goes."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2

from saeguard_server.rpc.server import LIVENESS, NOT_SERVING, SERVICE_UNKNOWN, SERVING, Health


def watch(health: Health, service: str = "") -> Any:
    return health.Watch(health_pb2.HealthCheckRequest(service=service), object())


async def said(watcher: Any) -> int:
    return int((await asyncio.wait_for(anext(watcher), 1)).status)


async def test_watchers_do_not_depend_on_each_other() -> None:
    health = Health(["a.B"])
    stays, leaves, other = watch(health), watch(health), watch(health, "a.B")
    assert [await said(one) for one in (stays, leaves, other)] == [NOT_SERVING] * 3
    waiting = asyncio.create_task(said(leaves))
    await asyncio.sleep(0)
    waiting.cancel()
    for ready in (True, False):
        health.set_ready(ready)
        assert [await said(one) for one in (stays, other)] == [SERVING if ready else NOT_SERVING] * 2


async def test_a_watcher_that_waits_is_woken() -> None:
    health = Health([])
    watcher = watch(health)
    assert await said(watcher) == NOT_SERVING
    waiting = asyncio.create_task(said(watcher))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    health.set_ready(True)
    assert await waiting == SERVING


async def test_a_watcher_that_does_not_read_blocks_nobody() -> None:
    health = Health([])
    slow, quick = watch(health), watch(health)
    assert await said(slow) == await said(quick) == NOT_SERVING
    for ready in (True, False, True):
        health.set_ready(ready)
        assert await said(quick) == (SERVING if ready else NOT_SERVING)
    assert await said(slow) == SERVING


async def test_an_unknown_service_is_watched_as_unknown_and_liveness_never_changes() -> None:
    health = Health([])
    assert await said(watch(health, "made.up")) == SERVICE_UNKNOWN
    for ready in (True, False):
        health.set_ready(ready)
        assert await said(watch(health, LIVENESS)) == SERVING
