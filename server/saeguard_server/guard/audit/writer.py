"""Writes records off the event loop: one thread, and one write and sync for all that came meanwhile."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from saeguard_server.observe.metrics import Metrics

_log = logging.getLogger(__name__)

MAX_BATCH = 256
MAX_KEPT = 10_000
"""Records that wait for a disk that cannot be written; what comes on top is lost, and counted in the chain."""
RETRY_S = 1.0


class AuditFailed(Exception):
    """A record that had to be written could not be."""


class Folder(Protocol):
    """Where records go."""

    def append(self, records: list[dict[str, Any]]) -> None:
        """All of them or none; raises OSError."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Job:
    record: dict[str, Any]
    done: asyncio.Future[None] | None


class AuditWriter:
    """A queue in front of a folder.

    Records that somebody waits for fail when they cannot be written. Others are kept and tried again; of those lost for
    want of room a record in the chain tells how many.
    """

    def __init__(self, folder: Folder, metrics: Metrics) -> None:
        self._folder, self._metrics = folder, metrics
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._kept: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def note(self, record: dict[str, Any]) -> None:
        """Takes a record that nobody waits for."""
        self._jobs.put(_Job(_stamped(record), None))

    async def write(self, record: dict[str, Any]) -> None:
        """Returns once the record is on the disk.

        Raises:
            AuditFailed: it is not.
        """
        done = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(_stamped(record), done))
        await done

    def close(self) -> None:
        """Writes what has come, and ends."""
        self._jobs.put(None)
        self._thread.join()
        self._folder.close()

    def _run(self) -> None:
        is_open = True
        while is_open:
            jobs, is_open = self._next()
            self._handle(jobs)
        if self._kept:
            _log.error("audit records could not be written", extra={"fields": {"lost": len(self._kept)}})

    def _next(self) -> tuple[list[_Job], bool]:
        """What has come, waiting for it; not for ever while something is kept."""
        jobs: list[_Job] = []
        try:
            one = self._jobs.get(timeout=RETRY_S if self._kept else None)
            while one is not None:
                jobs.append(one)
                if len(jobs) == MAX_BATCH:
                    return jobs, True
                one = self._jobs.get_nowait()
        except queue.Empty:
            return jobs, True
        return jobs, False

    def _handle(self, jobs: list[_Job]) -> None:
        lost = [_stamped({"kind": "lost", "records": self._lost})] if self._lost else []
        records = [*lost, *self._kept, *(job.record for job in jobs)]
        if not records:
            return
        try:
            self._folder.append(records)
        except OSError as err:
            self._metrics.audit_failures.inc()
            _log.error("the audit cannot be written", extra={"fields": {"reason": err.strerror}})
            self._keep(jobs)
            _settle(jobs, AuditFailed(f"the audit cannot be written: {err.strerror}"))
        else:
            self._metrics.audit_records.inc(len(records))
            self._kept.clear()
            self._lost = 0
            _settle(jobs, None)

    def _keep(self, jobs: list[_Job]) -> None:
        for job in jobs:
            if job.done is not None:
                continue
            if len(self._kept) < MAX_KEPT:
                self._kept.append(job.record)
            else:
                self._lost += 1


def _stamped(record: dict[str, Any]) -> dict[str, Any]:
    return {"time": datetime.now(UTC).isoformat(timespec="microseconds"), **record}


def _settle(jobs: list[_Job], error: AuditFailed | None) -> None:
    for job in jobs:
        if job.done is not None:
            job.done.get_loop().call_soon_threadsafe(_set, job.done, error)


def _set(done: asyncio.Future[None], error: AuditFailed | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
