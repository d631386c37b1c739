"""Goodput against offered load: what is complete within its deadline, of what the server can do without deadlines.

Requests for ``NEW`` tokens come at random, at multiples of the capacity that the same run measured first, to the served
demo or to a server that runs already. A JSON line a point, and a picture; ``--beside`` draws the lines of an earlier
run, or of another version, into it. About four minutes.

    PYTHONPATH=tests python -m bench.overload --svg tests/overload.svg | tee overload.jsonl
    PYTHONPATH=tests python -m bench.overload --address 127.0.0.1:50051 --beside before.jsonl --svg tests/overload.svg
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from contextlib import nullcontext
from math import log2
from pathlib import Path
from typing import Any

from bench.report import Line, say
from bench.soak import ready, served
from saeguard_client import AsyncClient, SaeguardError

LOADS = (0.5, 1.0, 1.5, 2.0, 4.0, 10.0)
NEW, STREAMS = 48, 64
TEXT = "Once upon a time there was a small village where"


class Point:
    """What became of the requests of one offered load."""

    def __init__(self, client: AsyncClient, deadline_s: float) -> None:
        self._client, self._deadline_s = client, deadline_s
        self.complete = self.late = 0
        self.refused_s: list[float] = []

    async def ask(self) -> None:
        began = time.monotonic()
        try:
            await self._client.generate(
                TEXT, max_new_tokens=NEW, ignore_eos=True, seed=random.getrandbits(31), deadline_s=self._deadline_s
            )
            self.complete += 1
        except SaeguardError as err:
            if err.reason == "OVERLOADED":
                self.refused_s.append(time.monotonic() - began)
            else:
                self.late += 1


async def capacity(client: AsyncClient, seconds: float) -> float:
    """Tokens a second of ``STREAMS`` callers who each ask again and again, without deadlines."""
    point, until = Point(client, 600.0), time.monotonic() + seconds

    async def keep_asking() -> None:
        while time.monotonic() < until:
            await point.ask()

    began = time.monotonic()
    await asyncio.gather(*(keep_asking() for _ in range(STREAMS)))
    return point.complete * NEW / (time.monotonic() - began)


async def measure(client: AsyncClient, load: float, full: float, args: argparse.Namespace) -> Line:
    """One point; its first second is not counted."""
    point, asked = Point(client, args.deadline), set[asyncio.Task[None]]()
    began = due = time.monotonic()
    warm: tuple[float, int] | None = None
    while (now := time.monotonic()) < began + args.seconds:
        if warm is None and now > began + 1.0:
            warm = now, point.complete
        # By a schedule, so that a slow client does not offer less.
        due += random.expovariate(load * full / NEW)
        await asyncio.sleep(max(due - time.monotonic(), 0.0))
        asked.add(asyncio.create_task(point.ask()))
    since, before = warm or (began, 0)
    goodput = (point.complete - before) * NEW / (time.monotonic() - since)
    await asyncio.gather(*asked)
    refused_s = statistics.median(point.refused_s) if point.refused_s else None
    return say(
        {
            "figure": "goodput under overload", "offered": load, "unit": "tokens/s", "goodput": round(goodput, 1),
            "capacity": round(full, 1), "ratio": round(goodput / full, 3), "deadline_s": args.deadline,
            "complete": point.complete, "refused": len(point.refused_s), "late": point.late,
            "median_refusal_ms": None if refused_s is None else round(1000 * refused_s, 1), "target": ">= 0.9",
        }
    )  # fmt: skip


async def run(address: str, args: argparse.Namespace) -> list[Line]:
    async with AsyncClient(address, deadline_s=600.0, retries=0) as client:
        await ready(client)
        await capacity(client, 3.0)
        lines = []
        for load in LOADS:
            # Before each point: a machine's speed changes within minutes.
            lines.append(await measure(client, load, await capacity(client, args.seconds / 2), args))
        return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each point")
    parser.add_argument("--deadline", type=float, default=2.0)
    parser.add_argument("--address", help="a server that runs already; by default one of its own")
    parser.add_argument("--beside", type=Path, help="JSON lines of another run, drawn in grey")
    parser.add_argument("--svg", type=Path, help="where the picture goes")
    args = parser.parse_args()
    with nullcontext((args.address, 0)) if args.address else served() as (address, _):
        lines = asyncio.run(run(address, args))
    if args.svg is not None:
        beside = args.beside.read_text().splitlines() if args.beside else []
        args.svg.write_text(
            picture(lines, [line for line in map(json.loads, beside) if "offered" in line], args.deadline)
        )


# --- the picture


LEFT, TOP, WIDE, HIGH = 60, 40, 460, 220


def picture(lines: list[Line], beside: list[Line], deadline_s: float) -> str:
    """An SVG: the share of the capacity that ends in time, by offered load."""
    marks = [
        _text(LEFT - 8, _y(share) + 4, f"{share:g}", "end") + _rule(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    marks += [_text(_x(load), TOP + HIGH + 18, f"{load:g}x", "middle") for load in LOADS]
    marks.append(
        f'<path d="M{LEFT},{_y(0.9):.1f} H{LEFT + WIDE}" stroke="#2a7" stroke-dasharray="4 3"/>'
        + _text(LEFT + WIDE - 4, _y(0.9) + 14, "aim: 0.9", "end")
    )
    if beside:
        marks.append(_curve(beside, "#999", "before"))
    marks.append(_curve(lines, "#c30", "now"))
    title = f"Tokens of answers complete within {deadline_s:g} s, of the capacity without deadlines"
    below = _text(LEFT + WIDE / 2, TOP + HIGH + 38, "offered load", "middle")
    body = "\n".join([_text(LEFT, 20, title, "start"), *marks, below])
    size = f'width="{LEFT + WIDE + 70}" height="{TOP + HIGH + 50}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _x(load: float) -> float:
    return LEFT + WIDE * log2(load / LOADS[0]) / log2(LOADS[-1] / LOADS[0])


def _y(share: float) -> float:
    return TOP + HIGH * (1 - min(share, 1.1) / 1.1)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _rule(share: float) -> str:
    return f'<path d="M{LEFT},{_y(share):.1f} H{LEFT + WIDE}" stroke="#ddd"/>'


def _curve(lines: list[Line], colour: str, name: str) -> str:
    points = [(_x(line["offered"]), _y(line["ratio"])) for line in lines]
    path: Any = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)
    x, y = points[-1]
    label = f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>'
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}{label}'


if __name__ == "__main__":
    main()
