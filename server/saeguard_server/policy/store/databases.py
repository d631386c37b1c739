"""What SQLite and Postgres have in common: connections, transactions, and hearing of changes."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
from sqlalchemy import Connection, event, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from saeguard_server.policy.store.protocol import SchemaMismatch, StoreCorrupted, StoreError, StoreUnreachable


class Database(ABC):
    """One database, and what is particular about it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def transaction(self, *, writes: bool) -> AsyncIterator[AsyncConnection]:
        """Committed when the block ends, rolled back when it raises."""
        async with self._engine.execution_options(saeguard_writes=writes).begin() as connection:
            yield connection

    @abstractmethod
    async def prepare(self, connection: AsyncConnection) -> None:
        """Before migrations, in their transaction: checks the database, and keeps other servers from migrating it."""

    @abstractmethod
    async def announce(self, connection: AsyncConnection) -> None:
        """Tells other processes, once the transaction is committed."""

    @abstractmethod
    def named(self, error: DBAPIError) -> StoreError:
        """Our name for what the driver raised."""

    async def listen(self) -> None:  # noqa: B027 - not every database can tell.
        """Starts to hear from other processes."""

    def notice(self) -> None:
        """Something may have changed."""
        self._changed.set()

    async def wait(self, timeout_s: float) -> None:
        """Returns on the next notice, or one since it last returned; at the latest after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    async def close(self) -> None:
        """Ends connections."""
        await self._engine.dispose()


# One file, for one server: every commit is on disk before it is acknowledged, and survives a kill at any moment.
#
# Changes that another process makes to the file are seen when it is polled.


LOCKED_S = 5.0
"""How long a writer waits for another one."""
_SQLITE_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT)
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")


class Sqlite(Database):
    """A file of SQLite in WAL mode."""

    def __init__(self, path: str) -> None:
        url = URL.create("sqlite+aiosqlite", database=path)
        engine = create_async_engine(url, connect_args={"timeout": LOCKED_S})
        event.listen(engine.sync_engine, "connect", _configure)
        event.listen(engine.sync_engine, "begin", _begin)
        super().__init__(engine)

    async def prepare(self, connection: AsyncConnection) -> None:
        """The file's own check of its pages; the transaction holds its write lock."""
        found = (await connection.exec_driver_sql("PRAGMA quick_check(1)")).scalar_one()
        if found != "ok":
            raise StoreCorrupted(str(found).replace("\n", " "))

    async def announce(self, connection: AsyncConnection) -> None:
        """SQLite has no way to."""

    def named(self, error: DBAPIError) -> StoreError:
        """By SQLite's primary result code."""
        said, code = str(error.orig), getattr(error.orig, "sqlite_errorcode", None)
        if code is not None and code & 0xFF in _SQLITE_DAMAGED:
            return StoreCorrupted(said)
        return SchemaMismatch(said) if said.startswith("no such ") else StoreUnreachable(said)


def _configure(connection: Any, _: object) -> None:
    # None: the driver begins nothing by itself, so that _begin can.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    # IMMEDIATE takes the write lock now: a reader that becomes a writer later can fail where waiting would have helped.
    writes = connection.get_execution_options()["saeguard_writes"]
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


# A Postgres database that several replicas share; each hears of a commit at once, and polls in case it does not.


LOG = logging.getLogger("saeguard.policies")

CHANNEL = "saeguard_policies"
AGAIN_S = 1.0
"""Between attempts to listen."""
QUIET_S = 30.0
"""Without a notification the listening connection is tried after so long."""
_MIGRATION_LOCK = 0x5AE_60A2D
_UNDEFINED_TABLE = "42P01"
_POSTGRES_DAMAGED = ("XX001", "XX002", "23")
"""Data and index corruption, and what the tables' own rules refuse, by the beginning of their SQLSTATE."""
# A machine that vanished is noticed in some 20 s rather than hours; the lease is over long before.
_KEEPALIVE = {"connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 3}


class Postgres(Database):
    """A database of Postgres, with one connection that listens."""

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
        """By SQLSTATE."""
        said, state = str(error.orig).partition("\n")[0], ""
        if isinstance(error.orig, psycopg.Error) and error.orig.sqlstate is not None:
            state = error.orig.sqlstate
        if state.startswith(_POSTGRES_DAMAGED):
            return StoreCorrupted(said)
        return SchemaMismatch(said) if state == _UNDEFINED_TABLE else StoreUnreachable(said)

    async def listen(self) -> None:
        """Starts to hear from other processes."""
        self._listening = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """Ends connections."""
        if self._listening is not None:
            self._listening.cancel()
            with suppress(asyncio.CancelledError):
                await self._listening
        await super().close()

    async def _listen(self) -> None:
        while True:
            try:
                await self._hear()
            except (psycopg.Error, SQLAlchemyError, OSError) as err:
                self._say_deaf(err)
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

    def _say_deaf(self, err: Exception) -> None:
        """Once until it hears again: attempts go on every second."""
        if not self._is_deaf:
            self._is_deaf = True
            LOG.warning("not hearing of policy changes, polling", extra={"fields": {"error": type(err).__name__}})
