"""``saeguard policy activate | rollback``."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard_client.cli.connection import add_connection, connect
from saeguard_client.cli.terminal import Terminal
from saeguard_client.policies import Activation


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
        active = client.policies().active
        activation = client.activate_revision(args.revision, expected_activation=_number(active), reason=args.reason)
    return _print(activation, active)


def run_rollback(args: argparse.Namespace) -> int:
    """Activates an older revision."""
    with connect(args) as client:
        active = client.policies().active
        activation = client.rollback_policies(args.to, expected_activation=_number(active), reason=args.reason)
    return _print(activation, active)


def _number(active: Activation | None) -> int:
    return 0 if active is None else active.number


def _print(activation: Activation, before: Activation | None) -> int:
    was = f", in place of revision {before.revision}" if before else ""
    Terminal().line(f"revision {activation.revision} is in force{was} (activation {activation.number})")
    return 0
