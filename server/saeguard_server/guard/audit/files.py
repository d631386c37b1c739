"""The files of a chain: ``audit-00000001.jsonl`` and so on in one folder, written by one process at a time."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from saeguard_server.guard.audit.chain import BrokenChain, Head, follow, link

_NAME = re.compile(r"audit-(\d{8})\.jsonl")


class AuditFolder:
    """Appends to the newest file, and begins another one when that is full.

    A line that a crash left half written is cut off when the folder is opened: nobody was told that it was there.
    """

    def __init__(self, folder: Path, *, key: bytes | None, max_bytes: int, sync: bool) -> None:
        """Opens it, and reads where the chain ends.

        Raises:
            OSError: the folder cannot be made or written, or another process writes it.
            BrokenChain: the end of the newest file is not a chain.
        """
        self._folder, self._key, self._max_bytes, self._sync = folder, key, max_bytes, sync
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            os.close(self._lock)
            raise OSError(err.errno, "another process writes this audit", str(folder)) from err
        try:
            self._number, self.head = self._find_end()
            self._file = self._open()
            self._size = os.fstat(self._file).st_size
        except BaseException:
            os.close(self._lock)
            raise

    def append(self, records: list[dict[str, Any]]) -> None:
        """Writes all of them or none, and returns once they are on the disk.

        Raises:
            OSError: they could not be written; the chain goes on from where it was.
        """
        head, lines = self.head, []
        for record in records:
            line, head = link(head, record, self._key)
            lines.append(line)
        data = b"".join(lines)
        if self._size and self._size + len(data) > self._max_bytes:
            self._rotate()
        # What came through of an attempt that failed must not stand there twice.
        os.ftruncate(self._file, self._size)
        _write(self._file, data)
        if self._sync:
            os.fsync(self._file)
        self._size += len(data)
        self.head = head

    def close(self) -> None:
        """Lets another process write."""
        os.ftruncate(self._file, self._size)
        os.close(self._file)
        os.close(self._lock)

    def _rotate(self) -> None:
        number = self._number
        self._number += 1
        try:
            new = self._open()
        except OSError:
            self._number = number
            raise
        os.close(self._file)
        self._file, self._size = new, 0

    def _open(self) -> int:
        file = os.open(self._folder / _name(self._number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if self._sync:
            _sync_folder(self._folder)
        return file

    def _find_end(self) -> tuple[int, Head]:
        found = files(self._folder)
        for _, path in reversed(found):
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                os.truncate(path, len(whole))
            if whole:
                return found[-1][0], _last(whole, self._key, path)
        return (found[-1][0] if found else 1), Head()


def files(folder: Path) -> list[tuple[int, Path]]:
    """The files of a chain with their numbers, in order."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match)


def read(folder: Path, key: bytes | None) -> Iterator[tuple[dict[str, Any], Head]]:
    """Every record with the head that it makes, the first one first.

    Raises:
        BrokenChain: the message names the file and line.
        OSError: a file cannot be read.
    """
    head, expected = Head(), 1
    for number, path in files(folder):
        if number != expected:
            raise BrokenChain(f"{_name(expected)} is missing")
        expected += 1
        with path.open("rb") as lines:
            for at, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    raise BrokenChain(f"{path.name}:{at} is cut off")
                try:
                    record, head = follow(head, line, key)
                except BrokenChain as err:
                    raise BrokenChain(f"{path.name}:{at} {err}") from err
                yield record, head


def _last(whole: bytes, key: bytes | None, path: Path) -> Head:
    """The head that the last line makes; that it follows the one before is for ``read`` to say."""
    line = whole[whole.rfind(b"\n", 0, -1) + 1 :]
    try:
        return _head_of(line, key)
    except BrokenChain as err:
        raise BrokenChain(f"{path.name}: the last record {err}") from err


def _head_of(line: bytes, key: bytes | None) -> Head:
    try:
        told = msgspec.json.decode(line, type=dict[str, Any])
        before = Head(int(told["seq"]) - 1, str(told["prev"]))
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as err:
        raise BrokenChain("is not a record") from err
    return follow(before, line, key)[1]


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
