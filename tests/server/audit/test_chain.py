"""The chain against a plain reading of its rules: every way to tamper with it shows."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard_server.audit.chain import (
    MAX_COUNTED,
    OTHERS,
    START,
    AuditFolder,
    BrokenChain,
    CallCounts,
    Head,
    read_audit,
    read_unwritten,
)
from support.disks import FailingDisk

KEY = b"k" * 32
RECORDS: list[dict[str, Any]] = [{"kind": "request", "caller": f"c{index}", "n": index} for index in range(12)]


def fill(folder: Path, records: list[dict[str, Any]], key: bytes | None = None, max_bytes: int = 600) -> Head:
    audit = AuditFolder(folder, key=key, max_bytes=max_bytes, sync=False)
    for one in records:
        audit.append([one])
    audit.close()
    return audit.head


def lines(folder: Path) -> list[str]:
    return [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_every_line_holds_the_digest_of_the_one_before(tmp_path: Path) -> None:
    head = fill(tmp_path, RECORDS)
    before = START
    for number, line in enumerate(lines(tmp_path), start=1):
        told = json.loads(line)
        claimed = told.pop("hash")
        assert (told["seq"], told["prev"]) == (number, before)
        text = json.dumps(told, sort_keys=True, separators=(",", ":"))
        assert claimed == hashlib.sha256(text.encode()).hexdigest()
        before = claimed
    assert head == Head(len(RECORDS), before)
    assert len(list(tmp_path.glob("*.jsonl"))) > 2


@pytest.mark.parametrize("key", [None, KEY])
def test_it_goes_on_where_it_ended(tmp_path: Path, key: bytes | None) -> None:
    fill(tmp_path, RECORDS[:5], key)
    fill(tmp_path, RECORDS[5:], key)
    assert [record["n"] for record, _ in read_audit(tmp_path, key)] == list(range(12))


def test_another_key_is_not_this_chain(tmp_path: Path) -> None:
    fill(tmp_path, RECORDS, KEY)
    for other in (None, b"x" * 32):
        with pytest.raises(BrokenChain, match="another key"):
            list(read_audit(tmp_path, other))


@settings(max_examples=60)
@given(st.data())
def test_any_change_shows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("chain")
    fill(folder, RECORDS, max_bytes=10**6)
    path = folder / "audit-00000001.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    at = data.draw(st.integers(0, len(kept) - 2))
    match data.draw(st.sampled_from(("change", "remove", "repeat", "swap"))):
        case "change":
            number = kept[at].index('"n":') + 4
            kept[at] = kept[at][:number] + "9" + kept[at][number:]
        case "remove":
            del kept[at]
        case "repeat":
            kept.insert(at, kept[at])
        case _:
            kept[at], kept[at + 1] = kept[at + 1], kept[at]
    path.write_text("".join(kept))
    with pytest.raises(BrokenChain, match=r"audit-00000001\.jsonl:"):
        list(read_audit(folder, None))


def test_a_missing_file_shows(tmp_path: Path) -> None:
    fill(tmp_path, RECORDS)
    (tmp_path / "audit-00000002.jsonl").unlink()
    with pytest.raises(BrokenChain, match=r"audit-00000002\.jsonl is missing"):
        list(read_audit(tmp_path, None))


def test_a_line_that_a_crash_left_half_is_cut_off(tmp_path: Path) -> None:
    fill(tmp_path, RECORDS[:3], max_bytes=10**6)
    path = tmp_path / "audit-00000001.jsonl"
    with path.open("ab") as file:
        file.write(b'{"kind":"request","half')
    with pytest.raises(BrokenChain, match="is cut off"):
        list(read_audit(tmp_path, None))
    fill(tmp_path, RECORDS[3:], max_bytes=10**6)
    assert [record["n"] for record, _ in read_audit(tmp_path, None)] == list(range(12))


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    audit = AuditFolder(tmp_path, key=None, max_bytes=100, sync=False)
    with pytest.raises(OSError, match="another process writes"):
        AuditFolder(tmp_path, key=None, max_bytes=100, sync=False)
    audit.close()


def test_a_full_disk_leaves_the_chain_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = AuditFolder(tmp_path, key=None, max_bytes=10**6, sync=True)
    audit.append(RECORDS[:2])
    real = os.write

    def half(file: int, data: Any) -> int:
        real(file, bytes(data)[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        audit.append(RECORDS[2:5])
    monkeypatch.setattr(os, "write", real)
    audit.append(RECORDS[2:])
    audit.close()
    assert [record["n"] for record, _ in read_audit(tmp_path, None)] == list(range(12))


@pytest.mark.parametrize("calls", ["write", "fsync", "ftruncate", "write gone", "fsync gone"])
@pytest.mark.parametrize("max_bytes", [10**6, 600])
def test_whatever_fails_the_chain_goes_on_also_over_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: str, max_bytes: int
) -> None:
    disk = FailingDisk(monkeypatch)
    audit = AuditFolder(tmp_path, key=None, max_bytes=max_bytes, sync=True)
    for number in range(0, 12, 2):
        disk.failing = calls
        with pytest.raises(OSError, match=r"No space|error|Read-only"):
            audit.append(RECORDS[number : number + 1])
        disk.failing = ""
        # Larger than what failed: a file may be left for the next one just now.
        audit.append(RECORDS[number : number + 2])
    audit.close()
    assert [record["n"] for record, _ in read_audit(tmp_path, None)] == list(range(12))


def test_how_many_are_unwritten_is_known_after_a_kill(tmp_path: Path) -> None:
    audit = AuditFolder(tmp_path, key=None, max_bytes=10**6, sync=True)
    audit.note_unwritten(1234)
    assert read_unwritten(tmp_path) == 1234
    audit.close()
    again = AuditFolder(tmp_path, key=None, max_bytes=10**6, sync=True)
    assert again.unwritten == 1234
    again.close()


def test_counts_of_unknown_peers_are_bounded() -> None:
    counts = CallCounts()
    for number in range(100_000):
        counts.add("refused", "peer", f"10.{number % 10_000}.0/24", outcome="UNAUTHENTICATED")
        counts.add("calls", "caller", "ann", method=f"/m{number % 3}")
    records = counts.take()
    refused = [record for record in records if record["kind"] == "refused"]
    assert len(refused) == MAX_COUNTED["refused"] + 1
    assert sum(record["calls"] for record in refused) == 100_000
    assert max(refused, key=lambda record: record["calls"])["peer"] == OTHERS
    assert [record["calls"] for record in records if record["kind"] == "calls"] == [33_334, 33_333, 33_333]
    assert not counts.take()
