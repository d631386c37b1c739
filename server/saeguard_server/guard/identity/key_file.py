"""API keys and the file that holds them: hashes, never the secrets, with who each key is and what it may do.

A key is ``sg_<id>_<secret>``: the id finds the record, the secret is 256 random bits.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from saeguard_server.caller import Role, check_name
from saeguard_server.settings import BadSettings

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
        check_name(self.name)
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


def revoke(keys: KeyFile, key_id: str) -> KeyFile:
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
