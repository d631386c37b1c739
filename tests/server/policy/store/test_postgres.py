"""Several servers and one database: what is heard at once, what happens while it is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from saeguard_server.observe import Metrics
from saeguard_server.policy.snapshot import PoliciesInForce, Snapshot
from saeguard_server.policy.store import open_store
from saeguard_server.policy.store.protocol import Active, PolicyStore, StoreUnreachable
from saeguard_server.policy.sync import PolicySync
from support.policies import a_policy
from support.postgres import PostgresServer

pytestmark = pytest.mark.postgres

POLL_S = 20.0
"""So long that whatever is faster was heard."""


@asynccontextmanager
async def replica(where: str, *, poll_s: float = POLL_S, stale_after_s: float = 60.0) -> AsyncIterator[PoliciesInForce]:
    """A server as far as policies go."""

    def build(active: Active) -> Snapshot:
        return Snapshot(active.activation, active.revision, cast(Any, None), {}, {})

    store = await open_store(where)
    policies = PoliciesInForce(stale_after_s)
    try:
        async with PolicySync(store, policies, build, Metrics(CollectorRegistry()), poll_s=poll_s).running():
            yield policies
    finally:
        await store.close()


async def put_in_force(store: PolicyStore, value: float) -> int:
    newest = await store.latest()
    etag = "0" if newest is None else str(newest.number)
    revision = await store.write([a_policy(value=value)], etag=etag, author="ann", reason="because")
    return (await store.activate(revision.number, actor="eve", reason="now")).number


@pytest.fixture
def where(new_database: Callable[[str], str]) -> str:
    return new_database("postgres")


async def test_every_server_hears_of_an_activation_at_once(where: str) -> None:
    writer = await open_store(where)
    await put_in_force(writer, 1.0)
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica(where)) for _ in range(3)]
        await asyncio.sleep(0.2)
        for value in (2.0, 3.0):
            number = await put_in_force(writer, value)
            found = await asyncio.gather(*(one.at_least(number, time.monotonic() + 5.0) for one in replicas))
            assert {one.activation.number for one in found} == {number}
    await writer.close()


async def test_servers_that_start_together_make_the_tables_once(where: str) -> None:
    stores = await asyncio.gather(*(open_store(where) for _ in range(4)))
    assert [await store.latest() for store in stores] == [None] * 4
    await asyncio.gather(*(store.close() for store in stores))


async def test_a_listener_that_was_cut_off_listens_again(
    where: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeguard_server.policy.store.postgres.AGAIN_S", 0.05)
    writer = await open_store(where)
    await put_in_force(writer, 1.0)
    async with replica(where) as policies:
        await asyncio.sleep(0.1)
        postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
        await asyncio.sleep(0.4)
        number = await put_in_force(writer, 2.0)
        assert (await policies.at_least(number, time.monotonic() + 5.0)).activation.number == number
    await writer.close()


async def test_without_the_database_servers_refuse_after_the_lease_and_recover(
    where: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, eventually: Callable[[Any], Any]
) -> None:
    monkeypatch.setattr("saeguard_server.policy.store.postgres.AGAIN_S", 0.05)
    writer = await open_store(where)
    await put_in_force(writer, 1.0)
    async with replica(where, poll_s=0.05, stale_after_s=0.6) as policies:
        before = policies.current()
        await asyncio.to_thread(postgres.stop)
        try:
            with pytest.raises(StoreUnreachable):
                await put_in_force(writer, 9.0)
            await eventually(lambda: not policies.is_current())
        finally:
            await asyncio.to_thread(postgres.start)
        await eventually(policies.is_current)
        assert policies.current() is before
        number = await put_in_force(writer, 2.0)
        assert (await policies.at_least(number, time.monotonic() + 5.0)).revision.number == 2
    await writer.close()
