"""Sixty-four streams while policies change all the time: is any answer unsteered, or steered by two revisions?

Each revision's one rule is named after it and edits a feature of its own, so that a receipt says which revision steered
an answer. An answer counts as wrong where its receipt and the revision that the reply names differ, or where it has no
edit. The audit of the run is then read: it must hold every answer under the same revision, without a gap.

    PYTHONPATH=tests python -m bench.policies.mixed --changes 1000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from saeguard_client import AsyncClient, SaeguardError
from saeguard_server.audit.chain import read_audit
from saeguard_server.demo.show import serve_process

STREAMS = 64
TEXTS = ("The old farmer", "Le matin, le boulanger", "def count(", "I think that the Earth is flat.")


def document(number: int) -> str:
    """The policy of a revision: its rule's name and feature are the revision's."""
    return (
        f"name: moving\nmode: enforce\nrequires_audit: true\nrules:\n"
        f"  - {{name: r{number}, sae: resid2, feature: {number % 768}, scale: 0.5}}\n"
    )


async def change(client: AsyncClient, changes: int, etag: str) -> None:
    """One revision after the other, each put in force at once."""
    for number in range(2, changes + 2):
        done = await client.apply_policies({"p.yaml": document(number)}, etag=etag, reason="change")
        etag = done.etag
        await client.activate_revision(number, expected_activation=number - 1, reason="change")


async def stream(
    client: AsyncClient, number: int, changing: asyncio.Task[None], seen: Counter[str], by: dict[str, int]
) -> None:
    """One request after the other until the changes are over."""
    count = 0
    while not changing.done():
        count += 1
        name = f"s{number}-{count}"
        try:
            done = await client.generate(TEXTS[count % len(TEXTS)], max_new_tokens=12, seed=count, request_id=name)
        except SaeguardError as err:
            seen[err.reason] += 1
            continue
        made = [one.rule for one in done.receipt.interventions] if done.receipt else []
        revision = done.policy.revision if done.policy else 0
        seen["right" if made == [f"r{revision}"] else "wrong"] += 1
        by[name] = revision


async def run(target: str, changes: int) -> tuple[Counter[str], dict[str, int]]:
    """What became of all answers, and under which revision each request was."""
    seen: Counter[str] = Counter()
    by: dict[str, int] = {}
    async with AsyncClient(target) as client:
        first = await client.apply_policies({"p.yaml": document(1)}, reason="first")
        await client.activate_revision(1, expected_activation=0, reason="first")
        while not await client.healthy():
            await asyncio.sleep(0.1)
        changing = asyncio.create_task(change(client, changes, first.etag))
        await asyncio.gather(*(stream(client, number, changing, seen, by) for number in range(STREAMS)))
        await changing
    return seen, by


def main() -> int:
    """Runs it; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=1000)
    changes = parser.parse_args().changes
    with tempfile.TemporaryDirectory(prefix="saeguard-") as folder:
        files = Path(folder)
        store = f'[policies]\nstore = "sqlite:///{files}/policies.db"\npoll_s = 0.05\nstale_after_s = 30.0\n'
        (files / "settings.toml").write_text(f'{store}[audit]\nfolder = "{files}/audit"\n', encoding="utf-8")
        began = time.monotonic()
        with serve_process("--config", str(files / "settings.toml")) as server:
            seen, by = asyncio.run(run(server.target, changes))
        took = time.monotonic() - began
        records = [record for record, _ in read_audit(files / "audit", None)]
    kept = {one["client_request_id"]: one for one in records if one["kind"] == "request"}
    missing = [
        name for name, revision in by.items() if name not in kept or kept[name]["policy"]["revision"] != revision
    ]
    acts = sum(one["kind"] == "policy" and one["act"] == "activate" and one["outcome"] == "done" for one in records)
    revisions = len(set(by.values()))
    passed = not (seen["wrong"] or missing) and set(seen) <= {"right"} and acts == changes + 1
    told = {
        "policies": "changing under streams", "changes": changes, "streams": STREAMS, "seconds": round(took, 1),
        "answers": dict(seen), "revisions_seen": revisions, "audit_records": len(records), "audit_gaps": len(missing),
        "passed": passed,
    }  # fmt: skip
    sys.stdout.write(json.dumps(told) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
