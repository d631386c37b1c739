"""What the process runs: ``python -m saeguard_server.engine.worker <file descriptor>``."""

from __future__ import annotations

import sys

from saeguard_server.engine.worker.worker import run_worker

if __name__ == "__main__":
    run_worker(int(sys.argv[1]))
