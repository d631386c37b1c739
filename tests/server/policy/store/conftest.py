"""Stores of both databases, empty, and a Postgres server for the whole run."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from saeguard_server.policy.store import open_store
from saeguard_server.policy.store.sql import SqlStore
from support.postgres import PostgresServer, folder_of_binaries, postgres_server

_names = count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server of its own; in CI it is a failure that it is not installed."""
    binaries = folder_of_binaries()
    if binaries is None:
        if os.environ.get("CI"):
            pytest.fail("Postgres is not installed; .ci/run installs it")
        pytest.skip("Postgres is not installed")
    with postgres_server(binaries) as server:
        yield server


@pytest.fixture
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Makes a database of a kind; its URL."""

    def make(kind: str) -> str:
        number = next(_names)
        if kind == "sqlite":
            return f"sqlite:///{tmp_path}/policies-{number}.db"
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.create_schema(f"policies_{number}")

    return make


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def where(request: pytest.FixtureRequest, new_database: Callable[[str], str]) -> str:
    """The URL of an empty database."""
    return new_database(request.param)


@pytest.fixture
async def store(where: str) -> AsyncIterator[SqlStore]:
    opened = await open_store(where)
    assert isinstance(opened, SqlStore)
    yield opened
    await opened.close()
