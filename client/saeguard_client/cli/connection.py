"""Flags that say where the server is, and the clients they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from saeguard_client._options import DEFAULT_DEADLINE_S
from saeguard_client.async_client import AsyncClient
from saeguard_client.cli import settings
from saeguard_client.cli.usage import UsageError, usage
from saeguard_client.client import Client


def add_connection(parser: argparse.ArgumentParser, *, with_defaults: bool) -> None:
    """The same flags before and after the command; only the first set has defaults, lest they undo the other's."""
    group = parser.add_argument_group("connection")
    group.add_argument("--target", metavar="HOST:PORT", help="server (default: $SAEGUARD_TARGET or 127.0.0.1:50051)")
    group.add_argument("--tls-ca", metavar="FILE", help="use TLS and trust these PEM certificates ($SAEGUARD_TLS_CA)")
    group.add_argument("--tls-cert", metavar="FILE", help="certificate chain to show the server ($SAEGUARD_TLS_CERT)")
    group.add_argument("--tls-key", metavar="FILE", help="its private key ($SAEGUARD_TLS_KEY)")
    # Files, not values: what is on a command line, every user of the machine can read.
    group.add_argument("--api-key-file", metavar="FILE", help="API key to show the server (or $SAEGUARD_API_KEY)")
    group.add_argument("--token-file", metavar="FILE", help="token to show the server (or $SAEGUARD_TOKEN)")
    group.add_argument("--deadline", metavar="SECONDS", type=float, help="give up after this long (default: 600)")
    defaults = _defaults() if with_defaults else {}
    for action in group._group_actions:
        action.default = defaults.get(action.dest, argparse.SUPPRESS)


def _defaults() -> dict[str, Any]:
    return {
        "target": settings.target(),
        "tls_ca": settings.tls_ca(),
        "tls_cert": settings.tls_cert(),
        "tls_key": settings.tls_key(),
        "api_key_file": None,
        "token_file": None,
        "deadline": DEFAULT_DEADLINE_S,
    }


def connect(args: argparse.Namespace) -> Client:
    """A client as the flags say.

    Raises:
        UsageError: the flags make no sense, or a file that they name cannot be read.
    """
    try:
        with usage():
            return Client(**_arguments(args))
    except OSError as err:
        raise UsageError(f"{err.filename}: {err.strerror}") from err


def connect_async(args: argparse.Namespace) -> AsyncClient:
    """The same for asyncio."""
    try:
        with usage():
            return AsyncClient(**_arguments(args))
    except OSError as err:
        raise UsageError(f"{err.filename}: {err.strerror}") from err


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "target": args.target,
        "root_certificates": args.tls_ca,
        "certificate_chain": args.tls_cert,
        "private_key": args.tls_key,
        "deadline_s": args.deadline,
        **_credential(args),
    }


def _credential(args: argparse.Namespace) -> dict[str, str | None]:
    """Of the flags; of the environment where there is no flag."""
    if args.api_key_file is None and args.token_file is None:
        return {"api_key": settings.api_key(), "token": settings.token()}
    return {"api_key": _secret(args.api_key_file), "token": _secret(args.token_file)}


def _secret(file: str | None) -> str | None:
    return None if file is None else Path(file).read_text(encoding="ascii", errors="replace").strip()
