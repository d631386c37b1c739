"""What may be named as a store, and what is said of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from saeguard_server.policy.store import open_store
from saeguard_server.policy.store.protocol import StoreUnreachable
from saeguard_server.settings import PolicySettings, Settings


@pytest.mark.parametrize(
    "where",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite:///x.db?mode=ro",
        "mysql://host/db",
        "postgresql+asyncpg://host/db",
        "policies",
    ],
)
async def test_other_stores_are_refused(where: str) -> None:
    with pytest.raises(
        ValueError, match="must be one of sqlite:///PATH, postgresql://USER@HOST/DATABASE, directory:PATH"
    ):
        await open_store(where)


@pytest.mark.parametrize("where", ["postgresql://ann:hunter2@host/db", "postgresql://host/db?password=hunter2"])
async def test_a_password_has_no_place_in_settings(where: str) -> None:
    with pytest.raises(ValueError, match=r"must hold no password: .*PGPASSFILE") as caught:
        await open_store(where)
    assert "hunter2" not in str(caught.value)


async def test_without_the_driver_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "saeguard_server.policy.store.postgres", raising=False)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ValueError, match=r'pip install "saeguard\[postgres\]"'):
        await open_store("postgresql://host/db")


def test_sqlite_needs_no_driver_of_postgres() -> None:
    code = "import sys; sys.modules['psycopg'] = None; import saeguard_server.policy.store"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_a_relative_file_is_where_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    await (await open_store("sqlite:///policies.db")).close()
    assert (tmp_path / "policies.db").is_file()


@pytest.mark.postgres
async def test_a_server_that_is_not_there_is_unreachable() -> None:
    with pytest.raises(StoreUnreachable, match="refused"):
        await open_store("postgresql://saeguard@127.0.0.1:9/policies")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"store": "mysql://host/db"}, "store: must be 'none' or begin with one of sqlite:///"),
        ({"store": ""}, "length >= 1"),
        ({"stale_after_s": 2.0}, "stale_after_s: must be at least 3 times poll_s, which is 1"),
        ({"stale_after_s": float("nan")}, "stale_after_s"),
        ({"poll_s": 0.0}, ">= 0.05"),
        ({"pols": 1}, "pols"),
    ],
)
def test_settings_that_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=said):
        msgspec.convert(given, PolicySettings)


def test_a_second_person_needs_persons() -> None:
    with pytest.raises(ValueError, match=r"policies.second_person: needs identity"):
        Settings(policies=PolicySettings(second_person=True))
