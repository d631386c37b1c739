"""What a file can suffer: kills, a full disk, damage, another writer that does not finish."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from saeguard_server.policy.store import databases, open_store
from saeguard_server.policy.store.protocol import NO_REVISION, StoreCorrupted, StoreUnreachable
from saeguard_server.policy.store.sql import SqlStore
from support.policies import a_policy
from support.policy_writer import Acknowledged, survived, writers

KILLS = 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policies.db"


def url(path: Path) -> str:
    return f"sqlite:///{path}"


async def written(path: Path, revisions: int = 3) -> None:
    store = await open_store(url(path))
    for number in range(revisions):
        await store.write([a_policy(value=float(number))], etag=str(number), author="ann", reason="because")
    await store.activate(1, actor="eve", reason="now")
    await store.close()


async def test_a_killed_writer_leaves_no_gap_and_loses_nothing_acknowledged(path: Path) -> None:
    """``bench.policies.kills`` does it more often."""
    kept = Acknowledged(0, 0)
    with writers(url(path)) as some:
        for _ in range(KILLS):
            told = some.kill_one(random.uniform(0.0, 0.15), kept)
            assert told.revision > kept.revision
            kept = await survived(url(path), told)


async def test_a_commit_waits_for_the_disk(path: Path) -> None:
    database = databases.Sqlite(str(path))
    async with database.transaction(writes=False) as connection:
        for pragma, expected in {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}.items():
            assert (await connection.exec_driver_sql(f"PRAGMA {pragma}")).scalar_one() == expected
    await database.close()


@contextmanager
def no_more_than(size: int) -> Iterator[None]:
    """The disk is full for this process: files cannot grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


async def test_on_a_full_disk_a_write_fails_by_name_and_reading_goes_on(path: Path) -> None:
    store = await open_store(url(path))
    assert isinstance(store, SqlStore)
    await store.write([a_policy()], etag=NO_REVISION, author="ann", reason="because")
    await store.activate(1, actor="eve", reason="now")
    with no_more_than(os.stat(f"{path}-wal").st_size + 1000):
        with pytest.raises(StoreUnreachable, match="disk"):
            await store.write([a_policy(value=2.0)], etag="1", author="ann", reason="because")
        active = await store.active()
        assert active is not None
        assert active.revision.number == 1
        assert await store.verify() == (1, 1)
    revision = await store.write([a_policy(value=2.0)], etag="1", author="ann", reason="there is room again")
    assert (revision.number, await store.verify()) == (2, (2, 1))
    await store.close()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "no database": lambda content: b"# notes\n" * 1000,
    "half a file": lambda content: content[: len(content) // 2],
    "zeros over a page": lambda content: content[:8192] + bytes(4096) + content[12288:],
    "a changed letter": lambda content: content.replace(b"because", b"becauze"),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_file_is_refused_by_name(path: Path, damage: str) -> None:
    await written(path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(StoreCorrupted):
        await open_store(url(path))


async def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnreachable, match="unable to open database file"):
        await open_store(url(tmp_path / "missing" / "policies.db"))


async def test_a_writer_that_does_not_finish_blocks_writing_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await written(path)
    monkeypatch.setattr(databases, "LOCKED_S", 0.05)
    store = await open_store(url(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnreachable, match="locked"):
            await store.activate(2, actor="eve", reason="now")
        assert (await store.active()) is not None
        other.execute("ROLLBACK")
    assert (await store.activate(2, actor="eve", reason="now")).number == 2
    await store.close()


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_nothing_is_written_to_a_file_that_was_removed(path: Path, is_replaced: bool) -> None:
    store = await open_store(f"sqlite:///{path}")
    await store.write([a_policy()], etag="0", author="ann", reason="because")
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    if is_replaced:
        path.touch()
    with pytest.raises(StoreUnreachable):
        await store.write([], etag="1", author="ann", reason="because")
    await store.close()
