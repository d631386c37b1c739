"""Every environment variable of the command line, read in one place."""

from __future__ import annotations

import os
from typing import Final

DEFAULT_TARGET: Final = "127.0.0.1:50051"


def target() -> str:
    """Where the server is when ``--target`` does not say."""
    return os.environ.get("SAEGUARD_TARGET") or DEFAULT_TARGET


def color_is_refused() -> bool:
    """NO_COLOR (no-color.org) with any text, or a terminal that cannot."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
