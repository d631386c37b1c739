"""Any engine in a process of its own: a crash there fails the requests it held, by name, and it is started again.

``engine`` is what the server holds, ``__main__`` what runs in the process, ``messages`` what goes between them.
"""

from __future__ import annotations

from saeguard_server.engine.worker.engine import WorkerEngine, load_engine

__all__ = ["WorkerEngine", "load_engine"]
