"""``saeguard``, the command line. ``main`` turns every way out into an exit code and a line on standard error."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Final

from saeguard_client.cli import parser
from saeguard_client.cli.parser import missing
from saeguard_client.cli.terminal import Terminal, UsageError, safe
from saeguard_client.errors import SaeguardError, Unauthenticated, Unavailable

__all__ = ["main"]

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character shows "?": better than to fail in the middle of a text.
            stream.reconfigure(errors="replace")
    args = parser.build_parser().parse_args(argv)
    try:
        return _run(args)
    except BrokenPipeError:
        # Whoever read our output is gone, as with `| head`; Python must not try to flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    terminal = Terminal()
    try:
        code: int = args.run(args)
    except UsageError as err:
        terminal.note(f"saeguard: {err}")
        return USAGE
    except SaeguardError as err:
        terminal.note(f"saeguard: {_explained(err, args.target)}")
        return UNREACHABLE if isinstance(err, Unavailable) else FAILED
    except ImportError as err:
        if not hasattr(args, "plugin"):
            raise
        terminal.note(missing(args.plugin, err))
        return USAGE
    return code


def _explained(error: SaeguardError, target: str) -> str:
    """The message, the fields that it does not name itself, and when to come back."""
    parts = [error.message]
    for violation in error.violations:
        if violation.field not in error.message:
            parts.append(f"{violation.field}: {violation.description}")
    if error.retry_after_s is not None:
        parts.append(f"try again in {error.retry_after_s:g} s")
    if isinstance(error, Unauthenticated):
        parts.append("show who you are with --api-key-file, --token-file or --tls-cert")
    if isinstance(error, Unavailable):
        parts.append(f"server: {target}")
    return safe("; ".join(parts), keep="")
