"""The chain of records: each line holds the digest of the one before it, so that a changed or missing one shows.

A line is one JSON object with sorted keys: ``seq`` counts from 1 without gaps over all files, ``prev`` is the digest of
the line before (zeros for the first), ``hash`` the digest of this one without ``hash``. The digest is SHA-256, or HMAC
with SHA-256 under a key: without a key, whoever may write the files can also write a new chain from any line on.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

START = "0" * 64
"""``prev`` of the first line."""


class BrokenChain(ValueError):
    """A line that does not follow the one before it; the message says how."""


@dataclass(frozen=True, slots=True)
class Head:
    """How far a chain goes: the number and digest of its last line."""

    seq: int = 0
    hash: str = START


def link(head: Head, record: Mapping[str, Any], key: bytes | None) -> tuple[bytes, Head]:
    """The line that comes after ``head``, newline included, and the head that it makes."""
    body = {**record, "seq": head.seq + 1, "prev": head.hash}
    after = Head(head.seq + 1, _digest(body, key))
    return msgspec.json.encode({**body, "hash": after.hash}, order="sorted") + b"\n", after


def follow(head: Head, line: bytes, key: bytes | None) -> tuple[dict[str, Any], Head]:
    """The record of the line that comes after ``head``, and the head that it makes.

    Raises:
        BrokenChain: it does not follow, or is not as it was written.
    """
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.MsgspecError as err:
        raise BrokenChain("is not a record") from err
    told = record.pop("hash", None)
    if record.get("seq") != head.seq + 1:
        raise BrokenChain(f"has number {record.get('seq')} where {head.seq + 1} comes next")
    if record.get("prev") != head.hash:
        raise BrokenChain("does not follow the record before it")
    if not isinstance(told, str) or not hmac.compare_digest(told, _digest(record, key)):
        raise BrokenChain("is not as it was written, or was written under another key")
    return record, Head(head.seq + 1, told)


def _digest(body: Mapping[str, Any], key: bytes | None) -> str:
    data = msgspec.json.encode(body, order="sorted")
    return (hashlib.sha256(data) if key is None else hmac.new(key, data, hashlib.sha256)).hexdigest()
