"""Processes that write policies as fast as they can, until they are killed, and say what was acknowledged."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from saeguard_server.policy.store import open_store
from saeguard_server.policy.store.protocol import NO_REVISION
from saeguard_server.policy.store.sql import SqlStore
from support.policies import a_policy

SUPPORT = Path(__file__).parent


@dataclass(frozen=True)
class Acknowledged:
    """The newest numbers that writers were told of, or that were found after the last one."""

    revision: int
    activation: int


class Writers:
    """Starts a writer, and kills it. Each is forked from a process that has imported everything."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def kill_one(self, after_s: float, before: Acknowledged) -> Acknowledged:
        """Lets a writer write for so long once it has begun, then sends SIGKILL. ``before`` is what there was."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        lines = iter(self._process.stdout.readline, "")
        pid = int(next(lines))
        newest = asdict(before)
        self._note(next(lines), newest)
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
        for line in lines:
            if line == "gone\n":
                break
            self._note(line, newest)
        return Acknowledged(**newest)

    @staticmethod
    def _note(line: str, newest: dict[str, int]) -> None:
        kind, number = line.split()
        newest[kind] = int(number)


@contextmanager
def writers(url: str) -> Iterator[Writers]:
    """Writers of one store, which must be one in which nobody else writes."""
    command = [sys.executable, "-m", "support.policy_writer", url]
    environment = os.environ | {"PYTHONPATH": str(SUPPORT.parent)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Writers(process)
        assert process.stdin is not None
        process.stdin.close()


async def survived(url: str, told: Acknowledged) -> Acknowledged:
    """Opens the store again; what it holds, all of which was checked.

    Raises:
        AssertionError: something acknowledged is lost, or more than the one act under way was kept.
        StoreCorrupted: a gap, or anything that is not as it was written.
    """
    store = await open_store(url)
    assert isinstance(store, SqlStore)
    try:
        revisions, activations = await store.verify()
        assert told.revision <= revisions <= told.revision + 1, (told, revisions)
        assert told.activation <= activations <= told.activation + 1, (told, activations)
        for number in {told.revision, revisions} - {0}:
            assert (await store.revision(number)).policies == (a_policy(value=float(number)),)
        return Acknowledged(revisions, activations)
    finally:
        await store.close()


async def _write(url: str) -> None:
    store = await open_store(url)
    newest = await store.latest()
    number = 0 if newest is None else newest.number
    while True:
        etag = str(number) if number else NO_REVISION
        number = (await store.write([a_policy(value=number + 1.0)], etag=etag, author="ann", reason="more")).number
        _say(f"revision {number}")
        act = await store.activate(random.randint(1, number), actor="eve", reason="now")
        _say(f"activation {act.number}")


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def _serve(url: str) -> None:
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            asyncio.run(_write(url))
        _say(str(pid))
        os.waitpid(pid, 0)
        _say("gone")


if __name__ == "__main__":
    _serve(sys.argv[1])
