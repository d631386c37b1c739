"""Databases of policies: transactions and hearing of changes, whichever it is; and SQLite, a file for one server.

Every commit is on disk before it is acknowledged, and survives a kill at any moment. Changes that another process makes
to the file are seen when it is polled.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from saeguard_server.policy.store.protocol import SchemaMismatch, StoreCorrupted, StoreError, StoreUnreachable

LOCKED_S = 5.0
"""How long a writer waits for another one."""
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT)
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")


class Database(ABC):
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
        await self._engine.dispose()


class Sqlite(Database):
    def __init__(self, path: str) -> None:
        url = URL.create("sqlite+aiosqlite", database=path)
        engine = create_async_engine(url, connect_args={"timeout": LOCKED_S})
        event.listen(engine.sync_engine, "connect", _configure)
        event.listen(engine.sync_engine, "begin", _begin)
        super().__init__(engine)
        self._path = path
        self._opened: os.stat_result | None = None

    async def prepare(self, connection: AsyncConnection) -> None:
        """The file's own check of its pages; the transaction holds its write lock."""
        with suppress(FileNotFoundError):  # it is in memory
            self._opened = os.stat(self._path)
        answer = (await connection.exec_driver_sql("PRAGMA quick_check(1)")).scalar_one()
        if answer != "ok":
            raise StoreCorrupted(str(answer).replace("\n", " "))

    async def announce(self, connection: AsyncConnection) -> None:
        """SQLite has no way to. But what is written to a file that was removed would be gone: it is refused."""
        if self._opened is not None and not os.path.samestat(os.stat(self._path), self._opened):
            raise StoreUnreachable(f"{self._path}: another file is there now than the one that was opened")

    def named(self, error: DBAPIError) -> StoreError:
        message, code = str(error.orig), getattr(error.orig, "sqlite_errorcode", None)
        if code is not None and code & 0xFF in _DAMAGED:
            return StoreCorrupted(message)
        return SchemaMismatch(message) if message.startswith("no such ") else StoreUnreachable(message)


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
