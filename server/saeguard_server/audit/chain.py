"""The chain of records: each line holds the digest of the one before it, so that a changed or missing one shows.

A line is one JSON object with sorted keys: ``seq`` counts from 1 without gaps over all files, ``prev`` is the digest of
the line before (zeros for the first), ``hash`` the digest of this one without ``hash``. The digest is SHA-256, or HMAC
with SHA-256 under a key: without a key, whoever may write the files can also write a new chain from any line on.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import hmac
import logging
import os
import queue
import re
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from saeguard_server.observe import Metrics

START = "0" * 64
"""``prev`` of the first line."""


class BrokenChain(ValueError):
    """A line that does not follow the one before it; the message says how."""


@dataclass(frozen=True, slots=True)
class Head:
    seq: int = 0
    hash: str = START


def append_link(head: Head, record: Mapping[str, Any], key: bytes | None) -> tuple[bytes, Head]:
    """The line that comes after ``head``, newline included, and the head that it makes."""
    body = {**record, "seq": head.seq + 1, "prev": head.hash}
    after = Head(head.seq + 1, _digest(body, key))
    return msgspec.json.encode({**body, "hash": after.hash}, order="sorted") + b"\n", after


def verify_link(head: Head, line: bytes, key: bytes | None) -> tuple[dict[str, Any], Head]:
    """The record of the line after ``head``, and the head that it makes. Raises BrokenChain."""
    record = _decode(line)
    digest, seq = record.pop("hash", None), record.get("seq")
    if type(seq) is not int:
        raise BrokenChain("has no number")
    if seq != head.seq + 1:
        raise BrokenChain(f"has number {seq} where {head.seq + 1} comes next")
    if record.get("prev") != head.hash:
        raise BrokenChain("does not follow the record before it")
    # As bytes: text that is not ASCII cannot be compared.
    if not isinstance(digest, str) or not hmac.compare_digest(digest.encode(), _digest(record, key).encode()):
        raise BrokenChain("is not as it was written, or was written under another key")
    return record, Head(head.seq + 1, digest)


def _decode(line: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as err:  # ValueError: it is not UTF-8
        raise BrokenChain("is not a record") from err


def _digest(body: Mapping[str, Any], key: bytes | None) -> str:
    data = msgspec.json.encode(body, order="sorted")
    return (hashlib.sha256(data) if key is None else hmac.new(key, data, hashlib.sha256)).hexdigest()


# --- the files


_NAME = re.compile(r"audit-(\d{8})\.jsonl")
_LOCK = "lock"
"""Held by the process that writes; it holds how many records that process has in memory alone, or lost."""
_LOCK_DIGITS = 20
MAX_LINE_BYTES = 256 * 2**20
"""More than any record takes: a longer line is not read into memory."""


class AuditFolder:
    """Appends to the newest of ``audit-00000001.jsonl`` and so on, and begins another one when that is full.

    One process at a time writes to a folder. Where its files are moved, removed or cut off meanwhile, nothing is
    written until ``recover`` has opened what is there again.

    A line that a crash left half written is cut off when the folder is opened: nobody was told that it was there.
    """

    def __init__(self, folder: Path, *, key: bytes | None, max_bytes: int, sync: bool) -> None:
        """Opens it, and reads where the chain ends.

        Raises:
            OSError: the folder cannot be made or written, or another process writes it.
            BrokenChain: the end of the newest file is not a chain.
        """
        self._folder, self._key, self._max_bytes, self._sync = folder, key, max_bytes, sync
        self._is_moved = False
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _open_lock(folder)
        try:
            self.unwritten = read_unwritten(folder)
            self._number, self.head = self._find_end()
            self._file = self._open(self._number)
            self._size = os.fstat(self._file).st_size
        except BaseException:
            os.close(self._lock)
            raise
        # Its place is taken while there is room: it is written over when there is none.
        self._store_unwritten(self.unwritten)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Writes all of them to the disk; or none, with an OSError: the chain goes on from where it was."""
        self._check_place()
        head, lines = self.head, []
        for record in records:
            line, head = append_link(head, record, self._key)
            lines.append(line)
        data = b"".join(lines)
        # What came through of an attempt that failed must not stand there twice, nor stay in a file that is left.
        os.ftruncate(self._file, self._size)
        if self._size and self._size + len(data) > self._max_bytes:
            self._rotate()
        try:
            _write(self._file, data)
            if self._sync:
                os.fsync(self._file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)
        self.head = head

    def _check_place(self) -> None:
        path = self._folder / _name(self._number)
        is_there = _is_at(path, self._file) and _is_at(self._folder / _LOCK, self._lock)
        self._is_moved |= not is_there or os.fstat(self._file).st_size < self._size
        if self._is_moved:
            raise OSError(errno.ESTALE, "its file was moved, removed or cut off", str(path))

    def recover(self) -> int:
        """After its files were moved, removed or cut off: opens what is there now; how many records are gone from it.

        Raises OSError: the folder is not there, or not the newest file in the folder that was open; or as at a start.
        """
        with _failing_as_disk():
            return self._reopen() if self._is_moved else 0

    def _reopen(self) -> int:
        is_same = _is_at(self._folder / _LOCK, self._lock)
        if is_same:
            os.stat(self._folder / _name(self._number))
        lock = self._lock if is_same else _open_lock(self._folder)
        try:
            number, head = self._find_end()
            file = self._open(number)
        except BaseException:
            if not is_same:
                os.close(lock)
            raise
        os.close(self._file)
        if not is_same:
            os.close(self._lock)
        gone = max(0, self.head.seq - head.seq)
        self._lock, self._number, self.head, self._file = lock, number, head, file
        self._size, self._is_moved = os.fstat(file).st_size, False
        self._store_unwritten(self.unwritten + gone)
        return gone

    def note_unwritten(self, records: int) -> None:
        """How many are only in memory, or lost: in place, so that a full disk has room for it and a kill leaves it."""
        if records != self.unwritten:
            self._store_unwritten(records)

    def _store_unwritten(self, records: int) -> None:
        self.unwritten = records
        with suppress(OSError):
            os.pwrite(self._lock, f"{records:0{_LOCK_DIGITS}}".encode(), 0)

    def close(self) -> None:
        with suppress(OSError):
            self._check_place()
            os.ftruncate(self._file, self._size)
        os.close(self._file)
        os.close(self._lock)

    def _rotate(self) -> None:
        with _failing_as_disk():
            new = self._open(self._number + 1)
        os.close(self._file)
        self._number, self._file, self._size = self._number + 1, new, 0

    def _open(self, number: int) -> int:
        file = _open_regular(self._folder / _name(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            if self._sync:
                _sync_folder(self._folder)
        except OSError:
            os.close(file)
            raise
        return file

    def _find_end(self) -> tuple[int, Head]:
        files = audit_files(self._folder)
        for _, path in reversed(files):
            with open(_open_regular(path), "rb") as file:
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                os.truncate(path, len(whole))
            if whole:
                return files[-1][0], _last(whole, self._key, path)
        return (files[-1][0] if files else 1), Head()


def _open_lock(folder: Path) -> int:
    lock = _open_regular(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(lock)
        raise OSError(err.errno, "another process writes this audit", str(folder)) from err
    return lock


def _open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Neither waits for a pipe's other end, nor follows a link to what has no end. Raises BrokenChain: it is such."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise BrokenChain(f"{path.name} is not a regular file")
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


@contextmanager
def _failing_as_disk() -> Iterator[None]:
    """For a server that runs: what cannot be used is tried again."""
    try:
        yield
    except BrokenChain as err:
        raise OSError(errno.EIO, str(err)) from err


def _is_at(path: Path, file: int) -> bool:
    """Whether this path still leads to the open file."""
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(file))
    return False


def audit_files(folder: Path) -> list[tuple[int, Path]]:
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match)


def read_unwritten(folder: Path) -> int:
    """Records that the server of this folder could not write, and that the chain does not count yet.

    Raises BrokenChain: its lock holds no count.
    """
    try:
        with open(_open_regular(folder / _LOCK), "rb") as file:
            text = file.read(_LOCK_DIGITS + 1)
    except FileNotFoundError:
        return 0
    if text and not (text.isdigit() and len(text) <= _LOCK_DIGITS):
        raise BrokenChain(f"{_LOCK} does not hold a count of records")
    return int(text or b"0")


def read_audit(
    folder: Path, key: bytes | None, check: Callable[[dict[str, Any]], None] = lambda record: None
) -> Iterator[tuple[dict[str, Any], Head]]:
    """Every record with the head that it makes, the first one first.

    Args:
        check: raises BrokenChain where a record is not what its reader can read.

    Raises:
        BrokenChain: the message names the file and line.
        OSError: a file cannot be read.
    """
    head, expected = Head(), 1
    for number, path in audit_files(folder):
        if number != expected:
            raise BrokenChain(f"{_name(expected)} is missing")
        expected += 1
        with open(_open_regular(path), "rb") as file:
            for at, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
                if not line.endswith(b"\n"):
                    raise BrokenChain(f"{path.name}:{at} is cut off")
                try:
                    record, head = verify_link(head, line, key)
                    check(record)
                except BrokenChain as err:
                    raise BrokenChain(f"{path.name}:{at} {err}") from err
                yield record, head


def _last(whole: bytes, key: bytes | None, path: Path) -> Head:
    """The head that the last line makes; that it follows the one before is for ``read_audit`` to say."""
    line = whole[whole.rfind(b"\n", 0, -1) + 1 :]
    try:
        return _head_of(line, key)
    except BrokenChain as err:
        raise BrokenChain(f"{path.name}: the last record {err}") from err


def _head_of(line: bytes, key: bytes | None) -> Head:
    record = _decode(line)
    try:
        before = Head(int(record["seq"]) - 1, str(record["prev"]))
    except (KeyError, TypeError, ValueError, OverflowError) as err:
        raise BrokenChain("is not a record") from err
    return verify_link(before, line, key)[1]


def _name(number: int) -> str:
    return f"audit-{number:08}.jsonl"


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- the writer


_log = logging.getLogger(__name__)

MAX_BATCH = 256
MAX_WAITING = 10_000
MAX_WAITING_BYTES = 64 * 2**20
"""What waits for a disk that cannot be written; what comes on top is lost, and counted in the chain."""
RETRY_S = 1.0
MINUTE_S = 60.0
"""How often calls that are only counted are written down."""


class AuditFailed(Exception):
    """A record that had to be written could not be."""


@dataclass(slots=True)
class _Job:
    record: dict[str, Any]
    done: asyncio.Future[None] | None = None
    is_droppable: bool = False
    """Whether nothing remains to be told once the one who waits has heard that it could not be written."""
    size: int = 0


class AuditWriter:
    """A queue in front of a folder, and a thread that writes: one write and sync for all that came meanwhile.

    Records that somebody waits for fail when they cannot be written. Others wait and are tried again; of those lost for
    want of room a record in the chain tells how many, also after a restart.
    """

    def __init__(self, folder: AuditFolder, metrics: Metrics) -> None:
        self._folder, self._metrics, self.counts = folder, metrics, CallCounts()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting: deque[_Job] = deque()
        self._waiting_bytes = 0
        self._lost, self._losing = folder.unwritten, threading.Lock()
        self._retry_at, self._counted_at = 0.0, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def note_refusal(self, record: dict[str, Any]) -> None:
        """Of a call that did no work; beyond ``MAX_REFUSALS`` of its caller in a minute it is only counted."""
        if self.counts.take_room(record["caller"]):
            self.note(record)
        else:
            method = record.get("method", record["kind"])
            self.counts.add("calls", "caller", record["caller"], method=method, outcome=record["outcome"])

    def note(self, record: dict[str, Any]) -> None:
        if self._jobs.qsize() < MAX_WAITING:
            self._jobs.put(_Job(_stamped(record)))
        else:
            self._lose(1)

    async def write(self, record: dict[str, Any], *, is_droppable: bool = False) -> None:
        """Returns once the record is on the disk.

        Args:
            is_droppable: whether it is dropped where it cannot be written; otherwise it is still written later, with
                ``late``, or counted as lost.

        Raises:
            AuditFailed: it is not on the disk.
        """
        if self._jobs.qsize() >= MAX_WAITING:
            self._lose(not is_droppable)
            raise AuditFailed("the audit cannot be written as fast as records come")
        done = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(_stamped(record), done, is_droppable))
        await done

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        self._folder.close()

    def _run(self) -> None:
        is_open = True
        while is_open:
            jobs, is_open = self._next()
            now = time.monotonic()
            # While the disk fails they are counted on: one record later takes no more room than one now.
            if not is_open or (now >= self._counted_at + MINUTE_S and not self._waiting):
                self._counted_at = now
                jobs += [_Job(_stamped(record)) for record in self.counts.take()]
            for job in jobs:
                _measure(job)
            self._handle(jobs, is_last=not is_open)
        if self._waiting or self._lost:
            _log.error("audit records could not be written", extra={"fields": {"lost": self._folder.unwritten}})

    def _next(self) -> tuple[list[_Job], bool]:
        """What has come, waiting for it; not for ever while something waits or is counted."""
        jobs: list[_Job] = []
        left = RETRY_S if self._waiting or self._lost else self._counted_at + MINUTE_S - time.monotonic()
        try:
            job = self._jobs.get(timeout=max(0.0, left))
            while job is not None:
                jobs.append(job)
                if len(jobs) == MAX_BATCH:
                    return jobs, True
                job = self._jobs.get_nowait()
        except queue.Empty:
            return jobs, True
        return jobs, False

    def _handle(self, jobs: list[_Job], *, is_last: bool) -> None:
        if time.monotonic() < self._retry_at and not is_last and all(job.done is None for job in jobs):
            # The disk has just failed, and nobody asks whether it still does.
            self._retry_later(jobs)
            return
        try:
            while self._waiting:
                first = list(islice(self._waiting, MAX_BATCH))
                self._append(first)
                for job in first:
                    self._waiting.popleft()
                    self._waiting_bytes -= job.size
            self._append(jobs)
        except OSError as err:
            self._retry_at = time.monotonic() + RETRY_S
            self._metrics.audit_failures.inc()
            _log.error("the audit cannot be written", extra={"fields": {"reason": err.strerror}})
            self._retry_later(jobs)
            _settle(jobs, AuditFailed(f"the audit cannot be written: {err.strerror}"))
        else:
            self._folder.note_unwritten(self._lost)
            _settle(jobs, None)

    def _append(self, jobs: list[_Job]) -> None:
        self._lose(self._folder.recover())
        lost = self._lost
        records = [_stamped({"kind": "lost", "records": lost})] if lost else []
        records += [job.record for job in jobs]
        if records:
            self._folder.append(records)
            self._lose(-lost)
            self._metrics.audit_records.inc(len(records))

    def _retry_later(self, jobs: list[_Job]) -> None:
        for job in jobs:
            if job.is_droppable:
                continue
            if job.done is not None:
                job.record["late"] = True
            if len(self._waiting) < MAX_WAITING and self._waiting_bytes + job.size <= MAX_WAITING_BYTES:
                self._waiting.append(job)
                self._waiting_bytes += job.size
            else:
                self._lose(1)
        self._folder.note_unwritten(self._lost + len(self._waiting))

    def _lose(self, records: int) -> None:
        with self._losing:
            self._lost += records


def _measure(job: _Job) -> None:
    """What is no JSON must not end the thread that writes: it becomes a record that one is lost."""
    try:
        job.size = len(msgspec.json.encode(job.record))
    except (TypeError, ValueError, OverflowError, RecursionError):
        _log.exception("a record cannot be written")
        if job.done is not None:
            _settle([job], AuditFailed("the record cannot be written"))
        job.record, job.done, job.is_droppable = _stamped({"kind": "lost", "records": 1}), None, False


def _stamped(record: dict[str, Any]) -> dict[str, Any]:
    return {"time": _now(), **record}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _settle(jobs: list[_Job], error: AuditFailed | None) -> None:
    for job in jobs:
        if job.done is not None:
            with suppress(RuntimeError):  # the loop of whoever waited is closed
                job.done.get_loop().call_soon_threadsafe(_set, job.done, error)


def _set(done: asyncio.Future[None], error: AuditFailed | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


# --- calls that are only counted


OTHERS = "others"
MAX_COUNTED = {"calls": 4096, "refused": 64}
"""Records that a minute may make of each kind; what comes beyond is counted together as that of ``others``."""
MAX_REFUSALS = 120
"""Records of its own that a minute may make of one caller's refused calls."""


class CallCounts:
    """Calls without a record of their own, counted by who called and how it ended until they are taken.

    ``calls`` are those of known callers, by ``caller``; ``refused`` are those that nobody is known to have made, by the
    ``peer``'s network: an attacker with as many addresses as it likes fills neither memory nor disk.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = _now()
        self._counts: dict[tuple[tuple[str, str], ...], int] = {}
        self._records: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()

    def take_room(self, caller: str) -> bool:
        """Whether a refusal of this caller gets a record of its own; asked once for each."""
        with self._lock:
            self._refusals[caller] += 1
            return self._refusals[caller] <= MAX_REFUSALS

    def add(self, kind: str, who: str, name: str, **facts: str) -> None:
        """One more; ``name`` is that of whoever it was, and ``who`` says what it is the name of."""
        with self._lock:
            key = (("kind", kind), (who, name), *facts.items())
            if key not in self._counts:
                if self._records[kind] >= MAX_COUNTED[kind]:
                    key = (("kind", kind), (who, OTHERS), *facts.items())
                else:
                    self._records[kind] += 1
            self._counts[key] = self._counts.get(key, 0) + 1

    def take(self) -> list[dict[str, Any]]:
        """A record for each kind of them, and counting begins again."""
        with self._lock:
            counts, since = self._counts, self._since
            self._counts, self._since = {}, _now()
            self._records.clear()
            self._refusals.clear()
        return [{**dict(key), "calls": count, "since": since} for key, count in counts.items()]
