"""``saeguard activations``: which features fire where in a text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from saeguard_client.activations import Activations, merge
from saeguard_client.catalog import Feature, FeatureRef
from saeguard_client.cli.columns import table
from saeguard_client.cli.connection import add_connection, connect
from saeguard_client.cli.generate import read_prompt
from saeguard_client.cli.report import as_json
from saeguard_client.cli.shading import shaded
from saeguard_client.cli.steering import add_steering, steering
from saeguard_client.cli.terminal import Terminal, safe
from saeguard_client.cli.usage import as_argument, usage
from saeguard_client.client import Client

EXAMPLES = """examples:
  saeguard activations "The bridge is golden" --sae resid4 --top 5
  saeguard activations "The bridge is golden" --feature resid4:4021
  saeguard activations - --sae resid4 --json < text.txt
"""


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """The command's arguments."""
    parser = subparsers.add_parser(
        "activations",
        help="show which features fire on which token",
        description="Read a text and show each token's strongest features, or colour the text by chosen features.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", metavar="TEXT", help="text to read, or - for standard input")
    parser.add_argument("--chat", action="store_true", help="TEXT is a user's message to a chat model")
    parser.add_argument("--sae", action="append", default=[], metavar="NAME", help="SAE to read with (default: all)")
    parser.add_argument(
        "--feature",
        action="append",
        default=[],
        metavar="SAE:FEATURE",
        type=as_argument(FeatureRef.parse),
        help="colour the text by this feature's value; may be repeated",
    )
    parser.add_argument("--top", type=int, default=3, metavar="K", help="features per token (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_steering(parser)
    add_connection(parser, with_defaults=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reads the text; 0 when it was answered."""
    terminal = Terminal()
    with connect(args) as client:
        found = _ask(client, args)
        if args.json:
            terminal.line(as_json({"activations": found}))
            return 0
        for line in _colored(client, args, found, terminal) if args.feature else _tables(client, found):
            terminal.line(line)
    return 0


def _ask(client: Client, args: argparse.Namespace) -> list[Activations]:
    saes, selection = args.sae, {"features": args.feature}
    if not args.feature:
        saes, selection = args.sae or [sae.name for sae in client.saes()], {"top_k": args.top}
    with usage():
        parts = client.activations_stream([read_prompt(args.text, args.chat)], saes, steer=steering(args), **selection)
    return merge(parts)


def _colored(client: Client, args: argparse.Namespace, found: list[Activations], terminal: Terminal) -> Iterator[str]:
    by_sae = {one.sae: one for one in found}
    for ref in args.feature:
        entry, read = client.feature(ref.sae, ref.feature), by_sae[ref.sae]
        values = [dict(read.row(i)).get(ref.feature, 0.0) for i in range(len(read))]
        strongest = max(values, default=0.0)
        yield terminal.shaded(f"{_named(entry)}: at most {strongest:.3g} here", "1")
        yield shaded([token.text for token in read.tokens], values, entry.maximum or strongest, terminal)
        yield ""


def _tables(client: Client, found: list[Activations]) -> Iterator[str]:
    for read in found:
        names = _names(client, read)
        yield f"{safe(read.sae, keep='')}"
        yield from table(
            [
                (str(i), f'"{safe(token.text, keep="")}"', _fired(read.row(i), names))
                for i, token in enumerate(read.tokens)
            ]
        )
        yield ""


def _fired(row: tuple[tuple[int, float], ...], names: dict[int, str]) -> str:
    return ", ".join(f"{names[feature]} {value:.3g}" for feature, value in row) or "-"


def _names(client: Client, read: Activations) -> dict[int, str]:
    return {feature: _named(client.feature(read.sae, feature)) for feature in sorted(set(read.indices))}


def _named(entry: Feature) -> str:
    label = safe(entry.label, keep="")
    return f"{entry.index} ({label})" if label else str(entry.index)
