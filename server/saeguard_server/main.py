"""The command ``saeguard``: what must be settled before gRPC is imported, then the command line."""

from __future__ import annotations

import os
from importlib import import_module


def main() -> int:
    # gRPC's core writes what strangers send to standard error as it came, new lines and all: they could forge lines of
    # the log. It reads this as it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    code: int = import_module("saeguard_client.cli").main()
    return code
