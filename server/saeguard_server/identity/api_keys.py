"""Callers known by an API key, which is put through scrypt when first seen, and not again while its file stays."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from saeguard_server.caller import Caller, Quota, Role, check_caller_name
from saeguard_server.errors import Overloaded, Unauthenticated
from saeguard_server.settings import BadSettings
from saeguard_server.watched import Stamp, stamp

# API keys and the file that holds them: hashes, never the secrets, with who each key is and what it may do.
#
# A key is ``sg_<id>_<secret>``: the id finds the record, the secret is 256 random bits.


KEY = re.compile(r"sg_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
PREFIX = "sg_"

SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**14, 8, 1
"""16 MiB and about 40 ms for each guess (RFC 7914)."""
_MAX_MEMORY = 64 * 2**20
_HASH = re.compile(r"scrypt\$([0-9]{1,7})\$([0-9]{1,2})\$([0-9]{1,2})\$([A-Za-z0-9+/=]{24})\$([A-Za-z0-9+/=]{44})")


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key, but for its secret."""

    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}$")]
    name: str
    """What logs, quotas and policies call whoever has it; several keys may share it while one replaces another."""
    roles: tuple[Role, ...]
    tags: tuple[str, ...] = ()
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    hash: str
    """``scrypt$n$r$p$salt$hash``, the last two in base64."""

    def __post_init__(self) -> None:
        check_caller_name(self.name)
        for name in ("created", "expires", "revoked"):
            when = getattr(self, name)
            if when is not None and when.tzinfo is None:
                raise ValueError(f"{name}: must have a time zone, such as 2027-01-31T00:00:00Z")
        if not _HASH.fullmatch(self.hash):
            raise ValueError("hash: must be scrypt$n$r$p$salt$hash")

    def matches(self, secret: str) -> bool:
        """Whether this is the key's secret; takes as long as scrypt does, whatever the answer."""
        found = _HASH.fullmatch(self.hash)
        assert found is not None, "checked when it was made"
        n, r, p = (int(found[group]) for group in (1, 2, 3))
        return hmac.compare_digest(_scrypt(secret, b64decode(found[4]), n, r, p), b64decode(found[5]))

    def why_invalid(self, now: datetime) -> str | None:
        """What has ended it, if anything."""
        if self.revoked is not None:
            return "revoked"
        if self.expires is not None and self.expires <= now:
            return "expired"
        return None


class KeyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds, as JSON."""

    keys: tuple[KeyRecord, ...] = ()

    def __post_init__(self) -> None:
        ids = [one.id for one in self.keys]
        if len(set(ids)) != len(ids):
            raise ValueError("keys: an id is given twice")


def make_key(
    name: str, roles: tuple[Role, ...], tags: tuple[str, ...], expires: datetime | None, *, cost: int = SCRYPT_N
) -> tuple[str, KeyRecord]:
    """A new key and its record; the key itself is kept nowhere.

    Raises:
        ValueError: a name or time that cannot be used.
    """
    key_id, secret, salt = secrets.token_hex(8), secrets.token_urlsafe(32), secrets.token_bytes(16)
    digest = _scrypt(secret, salt, cost, SCRYPT_R, SCRYPT_P)
    hashed = f"scrypt${cost}${SCRYPT_R}${SCRYPT_P}${b64encode(salt).decode()}${b64encode(digest).decode()}"
    record = KeyRecord(
        id=key_id, name=name, roles=roles, tags=tags, created=_now(), expires=expires, hash=hashed
    )  # fmt: skip
    return f"{PREFIX}{key_id}_{secret}", record


def read_keys(path: Path) -> KeyFile:
    """The file's keys.

    Raises:
        BadSettings: it is not there, is no such file, or others than its owner and group may read or change it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read()
    except OSError as err:
        raise BadSettings(f"{path}: {err.strerror}") from err
    if mode & 0o027:
        raise BadSettings(f"{path}: others may read or change it (mode {mode & 0o777:04o}): chmod 600, or 640 at most")
    try:
        return msgspec.json.decode(raw, type=KeyFile)
    except msgspec.DecodeError as err:
        raise BadSettings(f"{path}: {err}") from err


def change_keys(path: Path, change: Callable[[KeyFile], KeyFile]) -> None:
    """Replaces the file by what ``change`` makes of it; a file that is not there has no keys yet.

    Whole or not at all, for its owner alone, and one change at a time.

    Raises:
        BadSettings: it cannot be read or written.
    """
    try:
        with _alone_in(path.parent):
            _replace(path, change(read_keys(path) if path.exists() else KeyFile()))
    except OSError as err:
        raise BadSettings(f"{path}: {err.strerror}") from err


def revoke_key(keys: KeyFile, key_id: str) -> KeyFile:
    """The same keys, that one ended now.

    Raises:
        BadSettings: there is none of that id.
    """
    if key_id not in {one.id for one in keys.keys}:
        raise BadSettings(f"no key has the id {key_id!r}")
    return KeyFile(
        keys=tuple(
            msgspec.structs.replace(one, revoked=_now()) if one.id == key_id and one.revoked is None else one
            for one in keys.keys
        )
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(path: Path, keys: KeyFile) -> None:
    # The server may read it as another user of its group: that stays as it was.
    old = path.stat() if path.exists() else None
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(keys), indent=2) + b"\n")
            if old is not None:
                os.fchmod(handle, old.st_mode & 0o640)
                _keep_owner(handle, old)
            file.flush()
            os.fsync(handle)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _keep_owner(handle: int, old: os.stat_result) -> None:
    mine = os.fstat(handle)
    if (mine.st_uid, mine.st_gid) != (old.st_uid, old.st_gid):
        os.fchown(handle, old.st_uid, old.st_gid)


def _scrypt(secret: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=salt, n=n, r=r, p=p, maxmem=_MAX_MEMORY, dklen=32)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


# What a caller shows of itself, and the protocol of those who can tell from it who that is.


BEARER = "Bearer "


@dataclass(frozen=True, slots=True)
class Presented:
    """The credentials of one RPC. Only the certificate's names are verified yet: by TLS."""

    authorization: tuple[str, ...] = field(default=(), repr=False)
    """Values of the ``authorization`` metadata."""
    spiffe_id: str | None = None
    """Of a certificate with this one URI, as SPIFFE wants it."""
    uris: tuple[str, ...] = ()
    """Of the certificate's subject alternative names."""
    dns: tuple[str, ...] = ()
    """Of the certificate's subject alternative names."""

    @property
    def bearer(self) -> str | None:
        """The token after "Bearer", where there is exactly one such value."""
        if len(self.authorization) != 1:
            return None
        scheme, value = self.authorization[0][: len(BEARER)], self.authorization[0][len(BEARER) :]
        return value if scheme.lower() == BEARER.lower() else None


class Authenticator(Protocol):
    """One way to know a caller."""

    wants: str
    """What to show, for whoever showed nothing."""

    def recognises(self, presented: Presented) -> bool:
        """Whether there is a credential of this kind, valid or not."""
        ...

    async def caller(self, presented: Presented) -> Caller:
        """Who showed it.

        Raises:
            Unauthenticated: it is not valid.
            Unavailable, Overloaded: that cannot be found out now.
        """
        ...


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


# Callers known by a name in the client certificate that TLS has verified.


SPIFFE = "spiffe://"


class Certificates:
    """A table from names to callers.

    A certificate with none of the names is no credential: it opened the connection, and says nothing of who calls.
    """

    wants = "a client certificate with a known name"

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers = dict(callers)

    def recognises(self, presented: Presented) -> bool:
        """Whether the certificate has a name in the table."""
        return bool(self._named(presented))

    async def caller(self, presented: Presented) -> Caller:
        """The one caller that the certificate names."""
        found = self._named(presented)
        if len(found) != 1:
            raise Unauthenticated("the client certificate names more than one caller")
        return self._callers[found[0]]

    def _named(self, presented: Presented) -> list[str]:
        # A name only counts as what it is: a DNS name with a scheme is no URI, and a URI without one is no DNS name.
        shown = {one for one in presented.uris if ":" in one and not one.startswith(SPIFFE)}
        shown |= {one for one in presented.dns if ":" not in one}
        shown |= {presented.spiffe_id} if presented.spiffe_id is not None else set()
        return [name for name in self._callers if name in shown]
