"""``saeguard features``: the catalogue, listed, searched and shown."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from saeguard.catalog import Feature, Model, Sae, SaeQuality, ServerInfo
from saeguard.results import Activations, merge
from saeguard.types import FeatureRef
from saeguard_client.cli.generate import add_steering, as_json, read_prompt, steering
from saeguard_client.cli.terminal import Terminal, add_connection, as_argument, connect, safe, shaded, table, usage
from saeguard_client.client import Client

FEATURE_EXAMPLES = """examples:
  saeguard features list --sae resid4 --limit 20
  saeguard features search "golden gate"
  saeguard features show resid4:4021
"""


def add_features(subparsers: argparse._SubParsersAction[Any]) -> None:
    """The command's arguments."""
    parser = subparsers.add_parser(
        "features",
        help="find features to steer",
        description="What is known about the SAEs' features.",
        epilog=FEATURE_EXAMPLES,
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


# ``saeguard activations``: which features fire where in a text.


ACTIVATION_EXAMPLES = """examples:
  saeguard activations "The bridge is golden" --sae resid4 --top 5
  saeguard activations "The bridge is golden" --feature resid4:4021
  saeguard activations - --sae resid4 --json < text.txt
"""


def add_activations(subparsers: argparse._SubParsersAction[Any]) -> None:
    """The command's arguments."""
    parser = subparsers.add_parser(
        "activations",
        help="show which features fire on which token",
        description="Read a text and show each token's strongest features, or colour the text by chosen features.",
        epilog=ACTIVATION_EXAMPLES,
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
    parser.set_defaults(run=run_activations)


def run_activations(args: argparse.Namespace) -> int:
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


# ``saeguard info``: the server, its model, its SAEs.


def add_info(subparsers: argparse._SubParsersAction[Any]) -> None:
    """The command's arguments."""
    parser = subparsers.add_parser(
        "info",
        help="show the server, its model and its SAEs",
        description="What is served, and what the server allows.",
        epilog="example:\n  saeguard info --target models.internal:50051 --tls-ca ca.pem\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_connection(parser, with_defaults=False)
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    """Asks three questions; 0 when all were answered."""
    terminal = Terminal()
    with connect(args) as client:
        server, model, saes = client.info(), client.model(), client.saes()
    if args.json:
        terminal.line(as_json({"server": server, "model": model, "saes": saes}))
        return 0
    for line in (*_server(server), *_model(model), "", *_saes(saes)):
        terminal.line(safe(line, keep=""))
    return 0


def _server(server: ServerInfo) -> Iterator[str]:
    limits = server.limits
    yield f"server  saeguard {server.version}, engine {server.engine}, edits: {', '.join(server.intervention_kinds)}"
    yield (
        f"limits  {limits.max_slots} running, {limits.max_queue} waiting, {limits.max_context} tokens, "
        f"{limits.max_interventions} edits, {limits.max_watch} watched features, {limits.max_deadline_s:g} s"
    )


def _model(model: Model) -> Iterator[str]:
    chat = "chat template" if model.has_chat_template else "no chat template"
    yield (
        f"model   {model.name}: {model.architecture}, {model.num_layers} layers of {model.d_model}, "
        f"{model.dtype}, {chat}, {model.digest[:12]}"
    )


def _saes(saes: tuple[Sae, ...]) -> Iterator[str]:
    rows = [
        (
            *(one.name, _place(one), one.architecture, str(one.d_sae), str(one.num_labelled)),
            *(*_quality(one.quality), *_quality(one.measured)),
        )
        for one in saes
    ]
    return table([("SAE", "SITE", "KIND", "FEATURES", "LABELLED", "L0", "FVU", "L0 HERE", "FVU HERE"), *rows])


def _place(sae: Sae) -> str:
    writes = ", ".join(sae.write_sites)
    return sae.site if writes in ("", sae.site) else f"{sae.site} -> {writes}"


def _quality(quality: SaeQuality | None) -> tuple[str, str]:
    values = (None, None) if quality is None else (quality.l0, quality.fvu)
    l0, fvu = ("-" if value is None else f"{value:.3g}" for value in values)
    return l0, fvu
