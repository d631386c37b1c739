"""``saeguard info``: the server, its model, its SAEs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from saeguard_client.catalog import Model, Sae, SaeQuality, ServerInfo
from saeguard_client.cli.columns import table
from saeguard_client.cli.connection import add_connection, connect
from saeguard_client.cli.report import as_json
from saeguard_client.cli.terminal import Terminal, safe


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
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
