"""``saeguard features``: the catalogue, listed, searched and shown."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from saeguard_client.catalog import Feature, FeatureRef
from saeguard_client.cli.columns import table
from saeguard_client.cli.connection import add_connection, connect
from saeguard_client.cli.report import as_json
from saeguard_client.cli.terminal import Terminal, safe
from saeguard_client.cli.usage import as_argument, usage

EXAMPLES = """examples:
  saeguard features list --sae resid4 --limit 20
  saeguard features search "golden gate"
  saeguard features show resid4:4021
"""


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """The command's arguments."""
    parser = subparsers.add_parser(
        "features",
        help="find features to steer",
        description="What is known about the SAEs' features.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="labelled features first, then the most frequent")
    listing.set_defaults(query="", run=run_list)
    search = actions.add_parser("search", help="features whose label, tokens or examples hold these words")
    search.add_argument("query", metavar="QUERY", help="words to look for")
    search.set_defaults(run=run_list)
    for one in (listing, search):
        one.add_argument("--sae", metavar="NAME", help="only this SAE's")
        one.add_argument("--limit", type=int, default=50, metavar="N", help="at most this many (default: 50)")
    show = actions.add_parser("show", help="everything about one feature")
    show.add_argument("feature", metavar="SAE:FEATURE", type=as_argument(FeatureRef.parse))
    show.set_defaults(run=run_show)
    for one in (listing, search, show):
        one.add_argument("--json", action="store_true", help="print one JSON object")
        add_connection(one, with_defaults=False)


def run_list(args: argparse.Namespace) -> int:
    """A table of features; 0 also when there are none."""
    terminal = Terminal()
    with connect(args) as client:
        with usage():
            walk = client.features(args.sae, args.query, args.limit)
        found = list(walk)
    if args.json:
        terminal.line(as_json({"features": found}))
        return 0
    if not found:
        terminal.note("no features found")
        return 0
    rows = [(str(one.ref), _number(one.maximum), _number(one.density), one.label or "-") for one in found]
    for line in table(_safe_rows([("FEATURE", "MAXIMUM", "DENSITY", "LABEL"), *rows])):
        terminal.line(line)
    return 0


def run_show(args: argparse.Namespace) -> int:
    """One feature's entry."""
    terminal = Terminal()
    with connect(args) as client:
        entry = client.feature(args.feature.sae, args.feature.feature)
    if args.json:
        terminal.line(as_json(entry))
        return 0
    for line in _entry(entry):
        terminal.line(safe(line, keep=""))
    return 0


def _entry(entry: Feature) -> Iterator[str]:
    score = "" if entry.label_score is None else f" ({entry.label_metric} {entry.label_score:.2f})"
    yield f"{entry.ref}  {entry.label or '(no label)'}{score}"
    yield f"maximum {_number(entry.maximum)}, fires on {_share(entry.density)} of tokens"
    if entry.quantiles:
        yield "quantiles " + ", ".join(f"{one.q:g}: {one.value:.3g}" for one in entry.quantiles)
    if entry.top_tokens:
        yield "promotes " + ", ".join(f'"{one.token}" {one.logit:.2f}' for one in entry.top_tokens)
    for one in entry.examples:
        yield f"  {one.value:8.3g}  {one.text}"


def _safe_rows(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [tuple(safe(cell, keep="") for cell in row) for row in rows]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.2%}"
