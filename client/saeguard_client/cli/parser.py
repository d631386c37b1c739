"""The command line's grammar.

Commands of other packages are listed without being imported: ``saeguard --help`` must not wait for torch, nor fail
where it is missing.
"""

from __future__ import annotations

import argparse
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any

from saeguard_client.cli import features, generate, policy
from saeguard_client.cli.terminal import add_connection

GROUP = "saeguard.commands"
"""Entry points of commands that other packages bring."""
DESCRIPTION = "Text from a language model, steered by its features."
EPILOG = """exit codes:
  0 done   1 the server refused or failed   2 wrong usage   3 the server cannot be reached   130 interrupted

examples:
  saeguard info
  saeguard features search bridge
  saeguard generate "I live in" --clamp resid4:4021=1.5max --compare
"""


class CommandParser(argparse.ArgumentParser):
    """A parser that may stand for one in a package which is only imported when it is asked to parse."""

    entry_point: EntryPoint | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, by the real parser where this is a stand-in."""
        if self.entry_point is None:
            return super().parse_known_args(args, namespace)
        parsed, rest = self._real(self.entry_point).parse_known_args(args, namespace)
        parsed.plugin = self.entry_point.name
        return parsed, rest

    def _real(self, entry_point: EntryPoint) -> argparse.ArgumentParser:
        try:
            add = entry_point.load()
        except ImportError as err:
            self.exit(2, missing(entry_point.name, err) + "\n")
        holder = argparse.ArgumentParser(prog="saeguard").add_subparsers()
        add(holder)
        real: argparse.ArgumentParser = holder.choices[entry_point.name]
        return real


def add_plugins(subparsers: argparse._SubParsersAction[Any]) -> None:
    """A stand-in for every installed command."""
    for entry_point in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        package = entry_point.module.partition(".")[0]
        stand_in = subparsers.add_parser(entry_point.name, help=f"from {package}; see its --help", add_help=False)
        stand_in.entry_point = entry_point


def missing(command: str, error: ImportError) -> str:
    """What to do about a command whose packages are not there."""
    return f'saeguard {command} needs packages that are not installed ({error}): pip install "saeguard[server]"'


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="saeguard", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"saeguard {_version()}")
    add_connection(parser, with_defaults=True)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for add in (
        generate.add_generate,
        features.add_activations,
        features.add_features,
        policy.add_policy,
        features.add_info,
    ):
        add(commands)
    add_plugins(commands)
    return parser


def _version() -> str:
    try:
        return version("saeguard")
    except PackageNotFoundError:
        return "(not installed)"
