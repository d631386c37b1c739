"""Callers known by an API key, which is put through scrypt when first seen, and not again while its file stays."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from saeguard_server.caller import Caller, Quota
from saeguard_server.errors import Overloaded, Unauthenticated
from saeguard_server.guard.identity.key_file import KEY, PREFIX, KeyRecord, read_keys
from saeguard_server.guard.identity.presented import Presented
from saeguard_server.settings import BadSettings
from saeguard_server.watched import Stamp, stamp

LOG = logging.getLogger("saeguard.identity")

MAX_VERIFIED = 1024
"""Keys that are remembered as right; the one that was not used for longest is forgotten first."""
CHECKS_AT_ONCE = 2
"""Threads that scrypt may have, with 16 MiB each."""
MAX_CHECKS = 32
"""Keys that may wait for it: guesses must not pile up."""

_UNKNOWN = "the API key is not known"


class _Snapshot:
    """The file as it was read once, and the keys that were found right since."""

    def __init__(self, records: tuple[KeyRecord, ...], quota_of: Callable[[str], Quota]) -> None:
        self.records = {one.id: one for one in records}
        self.callers = {
            one.id: Caller(one.name, frozenset(one.roles), frozenset(one.tags), quota_of(one.name)) for one in records
        }
        self.checking: dict[bytes, asyncio.Task[bool]] = {}
        self._right: OrderedDict[bytes, None] = OrderedDict()

    def is_right(self, digest: bytes) -> bool:
        if digest not in self._right:
            return False
        self._right.move_to_end(digest)
        return True

    def remember(self, digest: bytes) -> None:
        self._right[digest] = None
        if len(self._right) > MAX_VERIFIED:
            self._right.popitem(last=False)


class ApiKeys:
    """Follows the file. One that can no longer be read or understood changes nothing: what was read last stays.

    Raises:
        BadSettings: at the start it must be readable.
    """

    wants = f'"authorization: Bearer {PREFIX}..." with an API key'

    def __init__(
        self, path: Path, quota_of: Callable[[str], Quota], now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path, self._quota_of, self._now = path, quota_of, now
        self._seen: Stamp | None = self._stamp()
        self._snapshot = _Snapshot(read_keys(path).keys, quota_of)
        self._room = asyncio.Semaphore(CHECKS_AT_ONCE)
        self._checks = 0

    def recognises(self, presented: Presented) -> bool:
        """Whether the token begins as our keys do."""
        return presented.bearer is not None and presented.bearer.startswith(PREFIX)

    async def caller(self, presented: Presented) -> Caller:
        """Whose key this is."""
        found = KEY.fullmatch(presented.bearer or "")
        snapshot = self._current()
        if found is None or found[1] not in snapshot.records:
            raise Unauthenticated(_UNKNOWN)
        record = snapshot.records[found[1]]
        if not await self._is_right(snapshot, record, found[2]):
            raise Unauthenticated(_UNKNOWN)
        # Only told to whoever has the secret.
        if why := record.why_invalid(self._now()):
            raise Unauthenticated(f"the API key is {why}")
        return snapshot.callers[record.id]

    async def _is_right(self, snapshot: _Snapshot, record: KeyRecord, secret: str) -> bool:
        digest = hashlib.sha256(f"{record.id}_{secret}".encode()).digest()
        if snapshot.is_right(digest):
            return True
        if digest not in snapshot.checking:
            self._begin(snapshot, digest, record, secret)
        # Shielded: others may wait for the same answer.
        return await asyncio.shield(snapshot.checking[digest])

    def _begin(self, snapshot: _Snapshot, digest: bytes, record: KeyRecord, secret: str) -> None:
        if self._checks >= MAX_CHECKS:
            raise Overloaded("too many API keys wait to be checked", retry_after_s=1.0)
        self._checks += 1
        task = asyncio.create_task(self._check(record, secret))
        snapshot.checking[digest] = task
        task.add_done_callback(lambda done: self._end(snapshot, digest, done))

    def _end(self, snapshot: _Snapshot, digest: bytes, done: asyncio.Task[bool]) -> None:
        self._checks -= 1
        del snapshot.checking[digest]
        if not done.cancelled() and done.exception() is None and done.result():
            snapshot.remember(digest)

    async def _check(self, record: KeyRecord, secret: str) -> bool:
        async with self._room:
            return await asyncio.to_thread(record.matches, secret)

    def _current(self) -> _Snapshot:
        now = self._stamp()
        if now != self._seen:
            # Also of one that cannot be used: it is tried again once it changes again.
            self._seen = now
            try:
                self._snapshot = _Snapshot(read_keys(self._path).keys, self._quota_of)
                LOG.info("API keys read again", extra={"fields": {"keys": len(self._snapshot.records)}})
            except BadSettings as err:
                LOG.error("API keys cannot be read, the old ones stay", extra={"fields": {"problem": str(err)}})
        return self._snapshot

    def _stamp(self) -> Stamp | None:
        try:
            return stamp([self._path])
        except OSError:
            return None
