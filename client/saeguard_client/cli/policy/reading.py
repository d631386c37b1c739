"""``saeguard policy list | show | history``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from saeguard_client.cli.columns import table
from saeguard_client.cli.connection import add_connection, connect
from saeguard_client.cli.report import as_json
from saeguard_client.cli.terminal import Terminal, safe
from saeguard_client.policies import Activation, PolicyHistory, PolicySet, PolicySummary, Revision


def add(actions: argparse._SubParsersAction[Any]) -> None:
    """Their arguments."""
    listing = actions.add_parser("list", help="policies at a glance, and what is in force")
    showing = actions.add_parser("show", help="policies as YAML, to edit and apply")
    for parser in (listing, showing):
        parser.add_argument("--revision", type=int, help="default: the latest")
    past = actions.add_parser("history", help="revisions and activations, the latest first")
    past.add_argument("--limit", type=int, help="at most so many of each")
    past.add_argument("--diff", action="store_true", help="also what each revision changed")
    for parser, run in ((listing, run_list), (showing, run_show), (past, run_history)):
        if parser is not showing:
            parser.add_argument("--json", action="store_true", help="print one JSON object")
        add_connection(parser, with_defaults=False)
        parser.set_defaults(run=run)


def run_list(args: argparse.Namespace) -> int:
    """Prints a line for each policy."""
    with connect(args) as client:
        found = client.policies(args.revision)
    return _print(args, found, _list(found))


def run_show(args: argparse.Namespace) -> int:
    """Prints the policies as YAML."""
    with connect(args) as client:
        found = client.policies(args.revision)
    Terminal().line(safe(found.yaml.rstrip("\n"), keep="\n"))
    return 0


def run_history(args: argparse.Namespace) -> int:
    """Prints what happened."""
    with connect(args) as client:
        found = client.policy_history(args.limit)
    return _print(args, found, _history(found, with_diffs=args.diff))


def when(time: datetime) -> str:
    """A time as people read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC")


def _print(args: argparse.Namespace, found: PolicySet | PolicyHistory, lines: Iterator[str]) -> int:
    terminal = Terminal()
    if args.json:
        terminal.line(as_json(found))
        return 0
    for line in lines:
        terminal.line(safe(line, keep=""))
    return 0


def _list(found: PolicySet) -> Iterator[str]:
    if found.active is None:
        yield "in force  nothing: no revision was ever activated"
    else:
        one = found.active
        yield f"in force  revision {one.revision}, since {when(one.time)}, activation {one.number} by {one.actor}"
    if found.revision is None:
        yield "listed    nothing: there is no revision"
        return
    yield f"listed    revision {found.revision.number} of {when(found.revision.time)} by {found.revision.author}"
    yield ""
    yield from table([("POLICY", "MODE", "SHARE", "RULES", "OWNER"), *(_row(one) for one in found.policies)])


def _row(one: PolicySummary) -> tuple[str, str, str, str, str]:
    mode = one.mode if one.expires is None else f"{one.mode} until {when(one.expires)}"
    return one.name, mode, f"{one.share:.0%}", ", ".join((*one.rules, *one.triggers)), one.owner or "-"


def _history(found: PolicyHistory, *, with_diffs: bool) -> Iterator[str]:
    both: tuple[Revision | Activation, ...] = (*found.revisions, *found.activations)
    for one in sorted(both, key=lambda one: one.time, reverse=True):
        yield _activation(one) if isinstance(one, Activation) else _revision(one)
        if with_diffs and isinstance(one, Revision):
            yield from (f"    {line}" for line in one.diff.splitlines())


def _activation(one: Activation) -> str:
    what = f"activation {one.number} puts revision {one.revision} in force"
    return f"{when(one.time)}  {what}  {one.actor}: {one.reason or '-'}"


def _revision(one: Revision) -> str:
    return f"{when(one.time)}  revision {one.number}  {one.author}: {one.reason or '-'}"
