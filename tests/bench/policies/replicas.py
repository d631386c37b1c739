"""Four servers follow one Postgres: how long until a change is enforced everywhere, and what a stopped database does.

Every change is a revision of 100 rules over 40 features at two layers, written and put in force; the time counts from
the answer to the activation until the last server enforces it. Then the database is killed: servers must refuse when
their lease is over, none earlier, and come back with it. JSON lines; exit 1 where a target is missed.

    PYTHONPATH=tests python -m bench.policies.replicas              1,000 changes
    PYTHONPATH=tests python -m bench.policies.replicas --changes 50
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.policies.replica import LAYERS
from bench.report import met, say
from saeguard.types import Cap
from saeguard_server.policy.model import Policy, Rule
from saeguard_server.policy.store import open_store
from saeguard_server.policy.store.protocol import PolicyStore
from support.postgres import PostgresServer, folder_of_binaries, postgres_server

TESTS = Path(__file__).parents[2]
SERVERS, RULES, FEATURES, PER_POLICY = 4, 100, 40, 20
POLL_S, STALE_AFTER_S = 1.0, 4.0
WAIT_S = 60.0
TARGET = "<= 100"
"""Milliseconds at the median."""


@dataclass
class Server:
    """A process of ``bench.policies.replica``, and what it has said."""

    process: Process
    lines: list[dict[str, Any]] = field(default_factory=list)
    said: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(json.loads(line))
            self.said.set()

    async def line(self, **wanted: object) -> dict[str, Any]:
        """The last line with these values, once there is one."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for line in reversed(self.lines):
                    if wanted.items() <= line.items():
                        return line
                self.said.clear()
                await self.said.wait()


@asynccontextmanager
async def servers(url: str) -> AsyncIterator[list[Server]]:
    """All of them, ended afterwards."""
    command = [sys.executable, "-m", "bench.policies.replica", url, str(POLL_S), str(STALE_AFTER_S)]
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    started = [
        Server(await asyncio.create_subprocess_exec(*command, stdout=PIPE, env=environment)) for _ in range(SERVERS)
    ]
    listening = [asyncio.create_task(one.listen()) for one in started]
    try:
        yield started
    finally:
        for one in started:
            # One that died has said why on stderr.
            with suppress(ProcessLookupError):
                one.process.terminate()
        await asyncio.gather(*(one.process.wait() for one in started), *listening)


def a_set(change: int) -> list[Policy]:
    """Rules that are all different from those of another change."""
    rules = [
        Rule(
            f"rule-{n}",
            Cap(f"layer{LAYERS[n % 2]}", n % FEATURES // 2, 1.0 + n + change / 1e4),
        )
        for n in range(RULES)
    ]
    # Features of one policy must differ: rule n and n + 40 are of two.
    groups = [rules[at : at + PER_POLICY] for at in range(0, RULES, PER_POLICY)]
    return [Policy(name=f"policy-{n}", mode="enforce", rules=tuple(group)) for n, group in enumerate(groups)]


async def change_all(store: PolicyStore, following: list[Server], changes: int) -> bool:
    """One after another, at random moments of the servers' polling."""
    took, since_asked = [], []
    for change in range(changes):
        newest = await store.latest()
        etag = "0" if newest is None else str(newest.number)
        revision = await store.write(a_set(change), etag=etag, author="ann", reason="because")
        asked = time.monotonic()
        act = await store.activate(revision.number, actor="eve", reason="now")
        answered = time.monotonic()
        lines = await asyncio.gather(*(one.line(activation=act.number) for one in following))
        if change:  # The first is what servers start with.
            last = max(line["at"] for line in lines)
            took.append(max(0.0, last - answered) * 1e3)
            since_asked.append((last - asked) * 1e3)
        await asyncio.sleep(random.uniform(0.0, 0.01))
    in_turn = all(_numbers(one) == list(range(1, changes + 1)) for one in following)
    median = _share(took, 0.5)
    say(
        {
            "figure": "commit to enforced by all", "unit": "ms", "servers": SERVERS, "changes": changes, "rules": RULES,
            "p50": median, "p95": _share(took, 0.95), "p99": _share(took, 0.99), "largest": _share(took, 1.0),
            "p50_since_asked": _share(since_asked, 0.5), "p95_since_asked": _share(since_asked, 0.95),
            "target": TARGET, "met": met(median, TARGET), "every_activation_seen_in_order": in_turn,
        }
    )  # fmt: skip
    return bool(met(median, TARGET)) and in_turn


async def stop_the_database(server: PostgresServer, following: list[Server], store: PolicyStore) -> bool:
    """Killed, and started again when all servers refuse."""
    for one in following:
        one.lines.clear()
    stopped = time.monotonic()
    await asyncio.to_thread(server.stop, "immediate")
    refused = [(await one.line(is_serving=False))["at"] - stopped for one in following]
    for one in following:
        one.lines.clear()
    await asyncio.to_thread(server.start)
    started = time.monotonic()
    back = [(await one.line(is_serving=True))["at"] - started for one in following]
    newest = await store.latest()
    assert newest is not None
    act = await store.activate(newest.number, actor="eve", reason="after")
    await asyncio.gather(*(one.line(activation=act.number) for one in following))
    # A look may lie up to a poll back when the database goes; its lease ends so much earlier.
    is_right = all(STALE_AFTER_S - POLL_S - 0.5 <= one <= STALE_AFTER_S + 0.5 for one in refused)
    say(
        {
            "figure": "database stopped", "unit": "s", "lease": STALE_AFTER_S,
            "refused_after": [round(one, 2) for one in refused], "served_again_after": [round(one, 2) for one in back],
            "met": is_right,
        }
    )  # fmt: skip
    return is_right


def _numbers(one: Server) -> list[int]:
    return [line["activation"] for line in one.lines if "activation" in line]


def _share(values: list[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 2)


async def measure(server: PostgresServer, changes: int) -> bool:
    """Whether all targets are met."""
    store = await open_store(server.url())
    try:
        async with servers(server.url()) as following:
            is_fast = await change_all(store, following, changes)
            return await stop_the_database(server, following, store) and is_fast
    finally:
        await store.close()


def main() -> int:
    """Exit 1 where a target is missed."""
    parser = argparse.ArgumentParser(prog="bench.policies.replicas")
    parser.add_argument("--changes", type=int, default=1000)
    given = parser.parse_args()
    binaries = folder_of_binaries()
    if binaries is None:
        sys.exit("Postgres is not installed")
    with postgres_server(binaries, durable=True) as server:
        return 0 if asyncio.run(measure(server, given.changes)) else 1


if __name__ == "__main__":
    sys.exit(main())
