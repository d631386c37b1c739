"""A server on the bundled model in a process of its own, for demonstrations that look at it from outside."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_ADDRESS = re.compile(r"serving \S+ on ([\d.]+:\d+)")


@dataclass(frozen=True, slots=True)
class Served:
    """Where it is. ``metrics`` is a URL, empty where there are none."""

    target: str
    metrics: str = ""


@contextmanager
def served(*flags: str, with_metrics: bool = False) -> Iterator[Served]:
    """Starts it with these flags, and stops it in the end.

    Raises:
        RuntimeError: it did not start; the message is what it said.
    """
    metrics = f"127.0.0.1:{_free_port()}" if with_metrics else ""
    saeguard = "import sys; from saeguard_client.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", saeguard, "serve", "--listen", "127.0.0.1:0", *flags]
    command += ["--metrics-listen", metrics, "--log-level", "warning"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if found := _ADDRESS.search(line):
                yield Served(found[1], f"http://{metrics}/metrics" if metrics else "")
                return
        raise RuntimeError("the server did not start:\n" + "".join(said))
    finally:
        server.terminate()
        server.communicate()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port
