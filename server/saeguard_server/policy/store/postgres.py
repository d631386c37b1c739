"""A Postgres database that several replicas share; each hears of a commit at once, and polls in case it does not.

Needs the extra "postgres".
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

import psycopg
from sqlalchemy import text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from saeguard_server.policy.store.databases import Database
from saeguard_server.policy.store.protocol import SchemaMismatch, StoreCorrupted, StoreError, StoreUnreachable

LOG = logging.getLogger("saeguard.policies")

CHANNEL = "saeguard_policies"
AGAIN_S = 1.0
"""Between attempts to listen."""
QUIET_S = 30.0
"""Without a notification the listening connection is tried after so long."""
_MIGRATION_LOCK = 0x5AE_60A2D
_UNDEFINED_TABLE = "42P01"
_DAMAGED = ("XX001", "XX002", "23")
"""Data and index corruption, and what the tables' own rules refuse, by the beginning of their SQLSTATE."""
# A machine that vanished is noticed in some 20 s rather than hours; the lease is over long before.
_KEEPALIVE = {"connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 3}


class Postgres(Database):
    def __init__(self, url: URL) -> None:
        options = {name: value for name, value in _KEEPALIVE.items() if name not in url.query}
        super().__init__(create_async_engine(url, connect_args=options, pool_size=2, pool_pre_ping=True))
        self._listening: asyncio.Task[None] | None = None
        self._is_deaf = False

    async def prepare(self, connection: AsyncConnection) -> None:
        """One server migrates, others wait for it."""
        await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})

    async def announce(self, connection: AsyncConnection) -> None:
        """Postgres sends it when the transaction commits, and not if it does not."""
        await connection.execute(text(f"NOTIFY {CHANNEL}"))

    def named(self, error: DBAPIError) -> StoreError:
        message, state = str(error.orig).partition("\n")[0], ""
        if isinstance(error.orig, psycopg.Error) and error.orig.sqlstate is not None:
            state = error.orig.sqlstate
        if state.startswith(_DAMAGED):
            return StoreCorrupted(message)
        return SchemaMismatch(message) if state == _UNDEFINED_TABLE else StoreUnreachable(message)

    async def listen(self) -> None:
        self._listening = asyncio.create_task(self._follow())

    async def close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            with suppress(asyncio.CancelledError):
                await self._listening
        await super().close()

    async def _follow(self) -> None:
        while True:
            try:
                await self._hear()
            except (psycopg.Error, SQLAlchemyError, OSError) as err:
                self._log_deaf(err)
            # Whoever waits looks at the database now: it is gone, or something was missed.
            self.notice()
            await asyncio.sleep(AGAIN_S)

    async def _hear(self) -> None:
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text(f"LISTEN {CHANNEL}"))
            driver: Any = (await connection.get_raw_connection()).driver_connection
            self._is_deaf = False
            self.notice()
            while True:
                async for _ in driver.notifies(timeout=QUIET_S, stop_after=1):
                    self.notice()
                await connection.execute(text("SELECT 1"))

    def _log_deaf(self, err: Exception) -> None:
        """Once until it hears again: attempts go on every second."""
        if not self._is_deaf:
            self._is_deaf = True
            LOG.warning("not hearing of policy changes, polling", extra={"fields": {"error": type(err).__name__}})
