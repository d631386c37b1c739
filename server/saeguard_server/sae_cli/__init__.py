"""``saeguard sae``: look at SAEs on disk or on the hub, check them on a model, convert them, import feature labels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from saeguard_server.sae_cli.checking import add as add_check
from saeguard_server.sae_cli.converting import add as add_convert
from saeguard_server.sae_cli.labels import add as add_labels
from saeguard_server.sae_cli.listing import add as add_list



def add_sae(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command; its namespace holds ``run``, which takes the namespace and returns the exit code."""
    parser = subparsers.add_parser(
        "sae", help="check, convert and list SAEs", description="SAEs on disk and on the hub."
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for add in (add_check, add_convert, add_list, add_labels):
        add(actions)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0 when it went well, 1 when an SAE cannot be read or does not hold."""
    act: Callable[[argparse.Namespace], int] = arguments.act
    try:
        return act(arguments)
    except (ValueError, OSError) as err:
        sys.stderr.write(f"saeguard sae: {err}\n")
        return 1
