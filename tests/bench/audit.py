"""What the audit costs: 64 streams of the bundled model without one, with one, and with one that requests wait for.

    cd tests && ../.venv/bin/python -m bench.audit

Prints a JSON line: tokens a second of each (the median of interleaved rounds), and their share of those without.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack

from saeguard_client import AsyncClient
from saeguard_server.settings import AuditSettings, EngineSettings
from support.served import serving_demo

STREAMS, ROUNDS, NEW = 64, 7, 48


async def tokens_per_second(client: AsyncClient) -> float:
    began = time.perf_counter()
    answers = await asyncio.gather(
        *(
            client.generate(f"Story {index}", max_new_tokens=NEW, ignore_eos=True, seed=index)
            for index in range(STREAMS)
        )
    )
    return sum(len(answer.tokens) for answer in answers) / (time.perf_counter() - began)


async def run(folder: str) -> dict[str, float]:
    audits = {
        "none": AuditSettings(),
        "kept": AuditSettings(folder=f"{folder}/kept"),
        "required": AuditSettings(folder=f"{folder}/required", required=True),
    }
    async with AsyncExitStack() as stack:
        clients = {}
        for name, audit in audits.items():
            app = await stack.enter_async_context(serving_demo(audit=audit, engine=EngineSettings(max_slots=STREAMS)))
            clients[name] = await stack.enter_async_context(AsyncClient(f"127.0.0.1:{app.port}"))
        rounds = [{name: await tokens_per_second(client) for name, client in clients.items()} for _ in range(ROUNDS)]
    speeds = {name: statistics.median(row[name] for row in rounds) for name in audits}
    shares = {f"{name}_share": round(speeds[name] / speeds["none"], 3) for name in ("kept", "required")}
    return {name: round(speed) for name, speed in speeds.items()} | shares


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(json.dumps({"audit": "64 streams", **asyncio.run(run(folder))}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
