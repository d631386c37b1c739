"""The command line's grammar."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version

from saeguard_client.cli import activations, features, generate, info, policy
from saeguard_client.cli.connection import add_connection
from saeguard_client.cli.plugins import CommandParser, add_plugins

DESCRIPTION = "Text from a language model, steered by its features."
EPILOG = """exit codes:
  0 done   1 the server refused or failed   2 wrong usage   3 the server cannot be reached   130 interrupted

examples:
  saeguard info
  saeguard features search bridge
  saeguard generate "I live in" --clamp resid4:4021=1.5max --compare
"""


def build() -> argparse.ArgumentParser:
    """The whole parser; commands of other packages are listed, not imported."""
    parser = CommandParser(
        prog="saeguard",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"saeguard {_version()}")
    add_connection(parser, with_defaults=True)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for add in (generate.add, activations.add, features.add, policy.add, info.add):
        add(commands)
    add_plugins(commands)
    return parser


def _version() -> str:
    try:
        return version("saeguard")
    except PackageNotFoundError:
        return "(not installed)"
