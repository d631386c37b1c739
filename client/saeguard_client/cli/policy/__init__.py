"""``saeguard policy``: what the server enforces; read, changed, put in force, tried."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard_client.cli.policy import changing, enforcing, reading, trying

_EPILOG = """examples:
  saeguard policy diff policies/                         what apply would change; nothing is stored
  saeguard policy apply policies/ --reason "calmer tone"
  saeguard policy activate 7 --reason "reviewed"
  saeguard policy rollback --reason "too many stops"     back to the revision that was in force before
  saeguard policy test cases.toml                        do the rules fire where they should, and only there?
"""


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """The command's sub-commands and their arguments."""
    parser = subparsers.add_parser(
        "policy",
        help="read, change and enforce policies",
        description="What the server enforces on everybody's requests. A change makes a revision; a revision takes "
        "effect when it is activated.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    for add_actions in (reading.add, changing.add, enforcing.add, trying.add):
        add_actions(actions)
