"""``saeguard key``: make, list and revoke the API keys of a file. A running server follows the file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from saeguard_server.caller import Role
from saeguard_server.settings import BadSettings

_UNITS = {"h": "hours", "d": "days"}
_LENGTH = re.compile(r"([1-9][0-9]{0,4})([hd])")


def add_key(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command; its namespace holds ``run``, which takes the namespace and returns the exit code."""
    parser = subparsers.add_parser("key", help="make, list and revoke API keys", description=__doc__)
    acts = parser.add_subparsers(required=True, metavar="ACTION")
    create = _act(acts, "create", "make a key and print it: nothing can show it again", _create)
    create.add_argument("name", help="what logs, quotas and policies call its holder")
    create.add_argument(
        "--role", action="append", required=True, choices=[role.value for role in Role], help="again for more"
    )  # fmt: skip
    create.add_argument("--tag", action="append", default=[], help="what policies can be aimed at; again for more")
    create.add_argument("--expires", metavar="WHEN", type=_when, help="12h, 90d, or a time such as 2027-01-31T00:00Z")
    _act(acts, "list", "show the keys of a file, without their secrets", _list)
    revoke = _act(acts, "revoke", "end a key now", _revoke)
    revoke.add_argument("id", help="what stands between the underscores of the key")


def _act(
    acts: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    act: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = acts.add_parser(name, help=text, description=text)
    parser.add_argument("--file", type=Path, required=True, help="the server's identity.api_keys")
    parser.set_defaults(run=lambda arguments: _told(act, arguments))
    return parser


def _told(act: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    try:
        return act(arguments)
    except (BadSettings, ValueError) as err:
        sys.stderr.write(f"saeguard key: {err}\n")
        return 2


def _create(arguments: argparse.Namespace) -> int:
    # Here and below: the command line asks every command to register before it knows which one runs.
    from saeguard_server.guard.identity.key_file import KeyFile, change_keys, make_key

    roles = tuple(Role(one) for one in dict.fromkeys(arguments.role))
    key, record = make_key(arguments.name, roles, tuple(dict.fromkeys(arguments.tag)), arguments.expires)
    change_keys(arguments.file, lambda keys: KeyFile(keys=(*keys.keys, record)))
    sys.stderr.write(f"key {record.id} of {record.name}; it is shown this once:\n")
    sys.stdout.write(f"{key}\n")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from saeguard_server.guard.identity.key_file import read_keys

    now = datetime.now(UTC)
    for one in read_keys(arguments.file).keys:
        state = one.why_invalid(now) or (f"until {one.expires:%Y-%m-%d %H:%M}" if one.expires else "valid")
        row = (one.id, one.name, ",".join(one.roles), ",".join(one.tags) or "-", f"{one.created:%Y-%m-%d}", state)
        sys.stdout.write("  ".join(row) + "\n")
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    from saeguard_server.guard.identity.key_file import change_keys, revoke

    change_keys(arguments.file, lambda keys: revoke(keys, arguments.id))
    sys.stderr.write(f"key {arguments.id} is revoked\n")
    return 0


def _when(text: str) -> datetime:
    """A length of time from now, or a time with its zone."""
    now = datetime.now(UTC).replace(microsecond=0)
    if found := _LENGTH.fullmatch(text):
        return now + timedelta(**{_UNITS[found[2]]: int(found[1])})
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = now.replace(tzinfo=None)
    if when.tzinfo is None or when <= now:
        raise argparse.ArgumentTypeError(f"must be such as 12h, 90d or 2027-01-31T00:00Z, and to come, got {text!r}")
    return when.astimezone(UTC)
