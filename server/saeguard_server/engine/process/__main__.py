"""What a child process runs: ``python -m saeguard_server.engine.process <file descriptor>``."""

from __future__ import annotations

import sys

from saeguard_server.engine.process.serving import run

if __name__ == "__main__":
    run(int(sys.argv[1]))
