"""Kills processes that write policies, at random moments, and looks at what is left: gaps, losses, damage.

A JSON line, and exit 1 where something acknowledged is gone, a number is missing, or the store does not open. What a
machine that loses its power leaves is not tried: it rests on SQLite's own promise for synchronous=FULL, and on fsync.

    PYTHONPATH=tests python -m bench.policies.kills                 100 kills over SQLite
    PYTHONPATH=tests python -m bench.policies.kills --postgres      the same over a Postgres of its own
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.report import say
from saeguard_server.policy.store.protocol import StoreError
from support.policy_writer import Acknowledged, survived, writers
from support.postgres import folder_of_binaries, postgres_server


@contextmanager
def store(is_postgres: bool) -> Iterator[str]:
    """The URL of an empty one."""
    if not is_postgres:
        with TemporaryDirectory(prefix="saeguard-kills-") as folder:
            yield f"sqlite:///{Path(folder) / 'policies.db'}"
        return
    binaries = folder_of_binaries()
    if binaries is None:
        sys.exit("Postgres is not installed")
    with postgres_server(binaries, durable=True) as server:
        yield server.url()


def kill(url: str, kills: int, longest_s: float) -> int:
    """How often what was left was not what it must be."""
    kept, wrong, began = Acknowledged(0, 0), 0, time.monotonic()
    with writers(url) as some:
        for _ in range(kills):
            told = some.kill_one(random.uniform(0.0, longest_s), kept)
            try:
                kept = asyncio.run(survived(url, told))
            except (AssertionError, StoreError) as err:
                wrong += 1
                say({"kill": "lost", "error": str(err)})
    say(
        {
            "figure": "kills",
            "store": url.partition(":")[0],
            "kills": kills,
            "wrong": wrong,
            "revisions": kept.revision,
            "activations": kept.activation,
            "seconds": round(time.monotonic() - began, 1),
        }
    )
    return wrong


def main() -> int:
    """Exit 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="bench.policies.kills")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--longest-s", type=float, default=0.2, help="a writer lives at most so long once it writes")
    parser.add_argument("--postgres", action="store_true")
    given = parser.parse_args()
    with store(given.postgres) as url:
        return 1 if kill(url, given.kills, given.longest_s) else 0


if __name__ == "__main__":
    sys.exit(main())
