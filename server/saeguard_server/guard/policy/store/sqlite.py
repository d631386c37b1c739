"""One file, for one server: every commit is on disk before it is acknowledged, and survives a kill at any moment.

Changes that another process makes to the file are seen when it is polled.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from saeguard_server.guard.policy.store.database import Database
from saeguard_server.guard.policy.store.protocol import (
    SchemaMismatch,
    StoreCorrupted,
    StoreError,
    StoreUnreachable,
)

LOCKED_S = 5.0
"""How long a writer waits for another one."""
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT)
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
        if code is not None and code & 0xFF in _DAMAGED:
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
