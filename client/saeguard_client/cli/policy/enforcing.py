"""``saeguard policy activate | rollback``."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard_client.cli.connection import add_connection, connect
from saeguard_client.cli.terminal import Terminal
from saeguard_client.cli.usage import UsageError
from saeguard_client.client import Client


def add(actions: argparse._SubParsersAction[Any]) -> None:
    """Their arguments."""
    activating = actions.add_parser("activate", help="put a revision in force")
    activating.add_argument("revision", type=int)
    back = actions.add_parser("rollback", help="put an older revision in force again")
    back.add_argument("--to", type=int, metavar="REVISION", help="default: the one that was in force before")
    for parser, run in ((activating, run_activate), (back, run_rollback)):
        parser.add_argument("--reason", required=True, help="why, for the history")
        add_connection(parser, with_defaults=False)
        parser.set_defaults(run=run)


def run_activate(args: argparse.Namespace) -> int:
    """Activates."""
    with connect(args) as client:
        return _activate(client, args.revision, args.reason)


def run_rollback(args: argparse.Namespace) -> int:
    """Activates what was in force before."""
    with connect(args) as client:
        return _activate(client, args.to or _before(client), args.reason)


def _activate(client: Client, revision: int, reason: str) -> int:
    active = client.policies().active
    done = client.activate_revision(revision, expected_activation=active.number if active else 0, reason=reason)
    was = f", in place of revision {active.revision}" if active else ""
    Terminal().line(f"revision {done.revision} is in force{was} (activation {done.number})")
    return 0


def _before(client: Client) -> int:
    acts = client.policy_history().activations
    older = [one.revision for one in acts if one.revision != acts[0].revision] if acts else []
    if not older:
        raise UsageError("no other revision was ever in force; name one with --to")
    return older[0]
