"""Flags that say where the server is, and the clients they make."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard_client._options import DEFAULT_DEADLINE_S
from saeguard_client.async_client import AsyncClient
from saeguard_client.cli import settings
from saeguard_client.cli.usage import UsageError, usage
from saeguard_client.client import Client

_DEFAULTS: dict[str, Any] = {"tls_ca": None, "tls_cert": None, "tls_key": None, "deadline": DEFAULT_DEADLINE_S}


def add_connection(parser: argparse.ArgumentParser, *, with_defaults: bool) -> None:
    """The same flags before and after the command; only the first set has defaults, lest they undo the other's."""
    group = parser.add_argument_group("connection")
    group.add_argument("--target", metavar="HOST:PORT", help="server (default: $SAEGUARD_TARGET or 127.0.0.1:50051)")
    group.add_argument("--tls-ca", metavar="FILE", help="use TLS and trust these PEM certificates")
    group.add_argument("--tls-cert", metavar="FILE", help="certificate chain to show the server")
    group.add_argument("--tls-key", metavar="FILE", help="its private key")
    group.add_argument("--deadline", metavar="SECONDS", type=float, help="give up after this long (default: 600)")
    defaults = {"target": settings.target(), **_DEFAULTS} if with_defaults else {}
    for action in group._group_actions:
        action.default = defaults.get(action.dest, argparse.SUPPRESS)


def connect(args: argparse.Namespace) -> Client:
    """A client as the flags say.

    Raises:
        UsageError: the flags make no sense, or a certificate cannot be read.
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
    }
