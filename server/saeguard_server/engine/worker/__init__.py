"""Any engine in a process of its own: a crash there fails the requests it held, by name, and it is started again.

``engine`` is what the server holds, ``child`` one process as its parent sees it, ``serving`` what runs in that process;
``messages`` and ``wire`` say what goes between them, ``facts`` what the parent knows of SAEs whose weights it lacks,
``counts`` how the metrics of processes that come and go are added up.
"""

from __future__ import annotations

from saeguard_server.engine.worker.engine import WorkerEngine, load_engine

__all__ = ["WorkerEngine", "load_engine"]
