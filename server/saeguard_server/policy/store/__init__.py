"""Where policies live: revisions and activations, append-only, in SQLite, Postgres or a read-only directory of YAML."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from saeguard_server.policy.store.databases import Database, Sqlite
from saeguard_server.policy.store.directory import DirectoryStore
from saeguard_server.policy.store.protocol import PolicyStore
from saeguard_server.policy.store.sql import SqlStore

DIRECTORY = "directory:"
FORMS = "sqlite:///PATH, postgresql://USER@HOST/DATABASE, directory:PATH"


async def open_store(where: str) -> PolicyStore:
    """The store that ``[policies] store`` names.

    Raises:
        ValueError: not one of ``FORMS``, or its driver is not installed. Never quotes a password.
        StoreError: it cannot be reached or used.
    """
    if where.startswith(DIRECTORY):
        return await DirectoryStore.open(Path(where.removeprefix(DIRECTORY)))
    return await SqlStore.open(_database(where))


def open_for_reading(where: str) -> SqlStore:
    """The database that ``[policies] store`` names, as it is: nothing is made or migrated.

    Raises:
        ValueError: it is none, or its file is not there.
    """
    if where.startswith("sqlite:///") and not Path(where.removeprefix("sqlite:///")).is_file():
        raise ValueError(f"{where}: there is no such file")
    return SqlStore(_database(where))


def _database(where: str) -> Database:
    try:
        url = make_url(where)
    except ArgumentError as err:
        raise ValueError(f"must be one of {FORMS}") from err
    if url.password is not None or "password" in url.query:
        raise ValueError("must hold no password: libpq finds it in PGPASSFILE, ~/.pgpass or PGPASSWORD")
    if url.drivername == "sqlite" and url.database and not (url.host or url.query):
        return Sqlite(url.database)
    if url.drivername == "postgresql":
        return _postgres(url.set(drivername="postgresql+psycopg"))
    raise ValueError(f"must be one of {FORMS}")


def _postgres(url: URL) -> Database:
    try:
        from saeguard_server.policy.store.postgres import Postgres
    except ImportError as err:
        raise ValueError('Postgres needs the extra "postgres": pip install "saeguard[postgres]"') from err
    return Postgres(url)
