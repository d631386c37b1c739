"""``saeguard policy apply | diff | lint | delete``: what makes revisions, or says what would."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from saeguard_client.cli.connection import add_connection, connect
from saeguard_client.cli.policy import documents
from saeguard_client.cli.terminal import Terminal, safe
from saeguard_client.policies import PolicyChange

NOTICED = 1
"""Exit code of ``lint`` where it noticed something."""


def add(actions: argparse._SubParsersAction[Any]) -> None:
    """Their arguments."""
    applying = actions.add_parser("apply", help="store a new revision made of these files")
    applying.add_argument("--reason", required=True, help="why, for the history")
    applying.add_argument("--activate", action="store_true", help="put it in force at once, where one person may")
    comparing = actions.add_parser("diff", help="what apply would change")
    linting = actions.add_parser("lint", help="check these files completely, against what is served")
    for parser, run in ((applying, run_apply), (comparing, run_diff), (linting, run_lint)):
        parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="YAML files, or folders of them")
        if parser is not linting:
            parser.add_argument("--prune", action="store_true", help="delete policies that are not in these files")
        add_connection(parser, with_defaults=False)
        parser.set_defaults(run=run)
    deleting = actions.add_parser("delete", help="store a new revision without one policy")
    deleting.add_argument("name")
    deleting.add_argument("--reason", required=True, help="why, for the history")
    add_connection(deleting, with_defaults=False)
    deleting.set_defaults(run=run_delete)


def run_apply(args: argparse.Namespace) -> int:
    """Stores, and tells what it stored."""
    terminal, files = Terminal(), documents.read(args.paths)
    with connect(args) as client:
        before = client.policies()
        change = client.apply_policies(files, etag=before.etag, reason=args.reason, prune=args.prune)
        _findings(terminal, change)
        number = change.revision.number
        if before.revision is not None and number == before.revision.number:
            terminal.line(f"nothing to change: revision {number} says the same")
        else:
            _diff(terminal, change)
            terminal.line(f"stored as revision {number}")
        if args.activate:
            expected = before.active.number if before.active else 0
            done = client.activate_revision(number, expected_activation=expected, reason=args.reason)
            terminal.line(f"revision {done.revision} is in force (activation {done.number})")
        elif before.active is None or before.active.revision != number:
            terminal.line(f"not in force yet: saeguard policy activate {number} --reason ...")
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Prints what would change."""
    terminal, files = Terminal(), documents.read(args.paths)
    with connect(args) as client:
        change = client.apply_policies(files, prune=args.prune, dry_run=True)
    _findings(terminal, change)
    if change.revision.diff:
        _diff(terminal, change)
    else:
        terminal.line("nothing would change")
    return 0


def run_lint(args: argparse.Namespace) -> int:
    """Prints what the server notices; 1 where that is anything."""
    terminal, files = Terminal(), documents.read(args.paths)
    with connect(args) as client:
        change = client.apply_policies(files, dry_run=True)
    _findings(terminal, change)
    if change.findings:
        return NOTICED
    terminal.line("nothing to say against these policies")
    return 0


def run_delete(args: argparse.Namespace) -> int:
    """Stores a revision without the policy."""
    terminal = Terminal()
    with connect(args) as client:
        change = client.delete_policy(args.name, etag=client.policies().etag, reason=args.reason)
    number = change.revision.number
    terminal.line(f"stored as revision {number}; not in force yet: saeguard policy activate {number} --reason ...")
    return 0


def _findings(terminal: Terminal, change: PolicyChange) -> None:
    for one in change.findings:
        terminal.note(safe(f"warning: {one.policy + ': ' if one.policy else ''}{one.message}", keep=""))


def _diff(terminal: Terminal, change: PolicyChange) -> None:
    terminal.line(safe(change.revision.diff.rstrip("\n"), keep="\n"))
