"""What is written, when it must be, and what a disk that cannot be written does to requests."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from prometheus_client import CollectorRegistry

from saeguard.requests import GenerateRequest, Sampling
from saeguard.results import Completion, PolicyFacts, Timings, Usage
from saeguard_server.audit.chain import AuditWriter, read_audit
from saeguard_server.audit.log import Audit, EncryptedText, HashedText
from saeguard_server.caller import LOCAL, Call
from saeguard_server.errors import Unavailable
from saeguard_server.observe import Metrics
from saeguard_server.settings import AuditSettings, BadSettings

CALL = Call("r-1", 0.0, LOCAL)
REQUEST = GenerateRequest(input="my secret prompt", sampling=Sampling(seed=5, temperature=0.0))
FACTS = PolicyFacts(activation=4, revision=3, applied=("calm",), shadowed=())
DONE = Completion(finish_reason="stop", usage=Usage(3, 2), timings=Timings(0.0, 0.1, 0.2), seed=5, policy=FACTS)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def audit(folder: Path, metrics: Metrics, **settings: Any) -> Audit:
    return Audit.of(AuditSettings(folder=str(folder), **settings), metrics)


def records(folder: Path, key: bytes | None = None) -> list[dict[str, Any]]:
    return [record for record, _ in read_audit(folder, key)]


def failures(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("saeguard_audit_failures_total") or 0.0


async def serve(one: Audit, *, required: bool = False) -> None:
    request = one.request(CALL, REQUEST)
    await request.admit(FACTS, 5, required=required)
    await request.finish(DONE, [1, 2, 3], [4, 5])


async def test_one_record_tells_who_asked_what_under_which_policies(tmp_path: Path, metrics: Metrics) -> None:
    one = audit(tmp_path, metrics)
    await serve(one)
    one.close()
    (told,) = records(tmp_path)
    assert (told["kind"], told["request_id"], told["caller"], told["outcome"]) == ("request", "r-1", "local", "stop")
    assert (told["policy"]["activation"], told["policy"]["revision"], told["seed"]) == (4, 3, 5)
    assert (told["prompt_tokens"], told["generated_tokens"]) == (3, 2)
    assert told["asked"]["sampling"]["temperature"] == 0.0
    assert "secret" not in json.dumps(told)
    assert not [name for name in told if name.startswith(("prompt_s", "answer"))]


async def test_what_must_be_audited_is_written_before_any_work(tmp_path: Path, metrics: Metrics) -> None:
    one = audit(tmp_path, metrics)
    request = one.request(CALL, REQUEST)
    await request.admit(FACTS, 5, required=True)
    assert [told["kind"] for told in records(tmp_path)] == ["admitted"]
    await request.finish(DONE, [1], [2])
    assert [told["kind"] for told in records(tmp_path)] == ["admitted", "request"]
    one.close()


async def test_the_conversation_of_a_token_is_the_one_recorded(tmp_path: Path, metrics: Metrics) -> None:
    log = audit(tmp_path, metrics)
    for conversation in (None, "", "c7"):
        call = replace(CALL, caller=replace(LOCAL, conversation=conversation))
        log.request(call, replace(REQUEST, conversation="c7" if conversation is None else "")).fail("CANCELLED")
    log.close()
    assert [record["asked"]["conversation"] for record in records(tmp_path)] == ["c7", "", "c7"]


async def test_a_failure_is_recorded_once(tmp_path: Path, metrics: Metrics) -> None:
    one = audit(tmp_path, metrics)
    request = one.request(CALL, REQUEST)
    request.fail("DEADLINE_EXCEEDED")
    request.fail("CANCELLED")
    one.close()
    assert [told["outcome"] for told in records(tmp_path)] == ["DEADLINE_EXCEEDED"]


async def test_text_is_hashed_or_sealed_by_choice(tmp_path: Path, metrics: Metrics) -> None:
    key = tmp_path / "key"
    key.write_bytes(Fernet.generate_key())
    hashed, sealed = tmp_path / "hashed", tmp_path / "sealed"
    for folder, settings in ((hashed, {"text": "hash"}), (sealed, {"text": "encrypt", "text_key_file": str(key)})):
        one = audit(folder, metrics, **settings)
        await serve(one)
        one.close()
    assert records(hashed)[0]["answer_sha256"] == HashedText().of([1, 2, 3], [4, 5])["answer_sha256"]
    told = records(sealed)[0]
    opener = EncryptedText(key.read_bytes())
    assert (opener.open(told["prompt_sealed"]), opener.open(told["answer_sealed"])) == ([1, 2, 3], [4, 5])


async def test_without_a_folder_only_those_that_must_be_audited_are_refused() -> None:
    await serve(Audit())
    with pytest.raises(Unavailable, match="this server keeps none"):
        await serve(Audit(), required=True)


class Disk:
    """A folder that can be full."""

    def __init__(self) -> None:
        self.is_full, self.written = False, []  # type: ignore[var-annotated]

    def append(self, told: list[dict[str, Any]]) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.written += told

    def close(self) -> None: ...


async def test_a_full_disk_fails_those_that_must_be_audited_and_loses_none_of_the_others(metrics: Metrics) -> None:
    disk = Disk()
    one = Audit(AuditWriter(disk, metrics))
    disk.is_full = True
    with pytest.raises(Unavailable, match="No space left"):
        await serve(one, required=True)
    await serve(one)
    await asyncio.sleep(0.05)
    assert not disk.written
    disk.is_full = False
    one.close()
    assert [told["kind"] for told in disk.written] == ["request"]
    assert failures(metrics) >= 2


async def test_an_answer_that_cannot_be_recorded_is_not_given(metrics: Metrics) -> None:
    disk = Disk()
    one = Audit(AuditWriter(disk, metrics), required=True)
    request = one.request(CALL, REQUEST)
    await request.admit(FACTS, 5, required=False)
    disk.is_full = True
    with pytest.raises(Unavailable, match="No space left"):
        await request.finish(DONE, [1], [2])
    one.close()


async def test_what_is_lost_is_counted_in_the_chain(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeguard_server.audit.chain.MAX_WAITING", 3)
    disk = Disk()
    writer = AuditWriter(disk, metrics)
    disk.is_full = True
    for number in range(5):
        writer.note({"kind": "request", "n": number})
    until = time.monotonic() + 5
    while failures(metrics) < 1 and time.monotonic() < until:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    disk.is_full = False
    writer.close()
    assert sum(told.get("records", 0) for told in disk.written) == 2
    assert [told["n"] for told in disk.written if told["kind"] == "request"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"text": "encrypt"}, "text_key_file"), ({"text_key_file": "k"}, "text_key_file"), ({"required": True}, "folder")],
)
def test_settings_that_make_no_sense(settings: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        AuditSettings(**settings)


def test_a_folder_that_cannot_be_used(tmp_path: Path, metrics: Metrics) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSettings, match="audit: "):
        audit(tmp_path / "file", metrics)
