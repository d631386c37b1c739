"""``saeguard generate --compare``: the same prompt and seed, without and with the edits, at the same time."""

from __future__ import annotations

import argparse
import asyncio
import secrets
from typing import Any

from saeguard_client.cli.columns import beside
from saeguard_client.cli.connection import connect_async
from saeguard_client.cli.report import as_json, summary
from saeguard_client.cli.terminal import Terminal, safe
from saeguard_client.inputs import Input
from saeguard_client.interventions import Intervention
from saeguard_client.results import Completion

_TITLES = ("unsteered", "steered")
_NARROW = 60


def run(args: argparse.Namespace, prompt: Input, steer: tuple[Intervention, ...], arguments: dict[str, Any]) -> int:
    """Shows both; 0 when both were answered."""
    terminal = Terminal()
    # One seed for both: otherwise they differ by chance and the edits cannot be seen.
    seed = secrets.randbelow(2**32) if arguments["seed"] is None else arguments["seed"]
    plain, steered = asyncio.run(_both(args, prompt, steer, {**arguments, "seed": seed}))
    if args.json:
        terminal.line(as_json(dict(zip(_TITLES, (plain, steered), strict=True))))
        return 0
    for line in _shown(safe(plain.text), safe(steered.text), terminal):
        terminal.line(line)
    terminal.note(summary(steered))
    return 0


async def _both(
    args: argparse.Namespace, prompt: Input, steer: tuple[Intervention, ...], arguments: dict[str, Any]
) -> tuple[Completion, Completion]:
    async with connect_async(args) as client:
        return await asyncio.gather(
            client.generate(prompt, **arguments), client.generate(prompt, steer=steer, **arguments)
        )


def _shown(plain: str, steered: str, terminal: Terminal) -> list[str]:
    if terminal.is_tty and terminal.width >= _NARROW:
        titles = list(beside(*_TITLES, terminal.width))
        return [terminal.shaded(titles[0], "1"), *beside(plain, steered, terminal.width)]
    return [f"--- {_TITLES[0]}", plain, f"--- {_TITLES[1]}", steered]
