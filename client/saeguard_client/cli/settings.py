"""Every environment variable of the command line, read in one place."""

from __future__ import annotations

import os
from typing import Final

DEFAULT_TARGET: Final = "127.0.0.1:50051"


def target() -> str:
    """Where the server is when ``--target`` does not say."""
    return os.environ.get("SAEGUARD_TARGET") or DEFAULT_TARGET


def tls_ca() -> str | None:
    """Authorities to trust when ``--tls-ca`` does not say."""
    return os.environ.get("SAEGUARD_TLS_CA")


def tls_cert() -> str | None:
    """Certificate chain when ``--tls-cert`` does not say."""
    return os.environ.get("SAEGUARD_TLS_CERT")


def tls_key() -> str | None:
    """Its private key when ``--tls-key`` does not say."""
    return os.environ.get("SAEGUARD_TLS_KEY")


def api_key() -> str | None:
    """The API key when no flag names a credential."""
    return os.environ.get("SAEGUARD_API_KEY")


def token() -> str | None:
    """The token when no flag names a credential."""
    return os.environ.get("SAEGUARD_TOKEN")


def color_is_refused() -> bool:
    """NO_COLOR (no-color.org) with any text, or a terminal that cannot."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
