"""Callers and disks that would keep the audit from telling what happened."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from saeguard.types import Cap, Clamp, Zero
from saeguard.v1 import generation_service_pb2 as pb
from saeguard.v1 import generation_service_pb2_grpc
from saeguard.v1 import intervention_pb2 as edit_pb
from saeguard_client import AsyncClient, Client, SaeguardError, Unavailable
from saeguard_client.cli import main
from saeguard_server.app import App
from saeguard_server.audit.chain import read_audit
from saeguard_server.caller import Quota, Role
from saeguard_server.policy.document import policy_to_yaml
from saeguard_server.policy.model import Policy, Rule
from saeguard_server.policy.store import open_store
from saeguard_server.settings import AuditSettings, IdentitySettings, PolicySettings
from support.credentials import bearer, write_keys
from support.disks import ERRORS, FailingDisk
from support.served import serving_demo
from support.server_process import server_process

Outcome = Callable[[str, str, str], None]
SUMMARY_BYTES = 500
"""Of a record that counts, in its file."""


def document(value: float) -> dict[str, str]:
    return {
        "calm.yaml": policy_to_yaml(Policy(name="calm", mode="enforce", rules=(Rule("cap", Cap("resid4", 3, value)),)))
    }


class Place:
    """Keys, a store and an audit of a server."""

    def __init__(self, path: Path) -> None:
        self.path, self.audit = path, path / "audit"
        self.store = f"sqlite:///{path / 'policies.db'}"
        self.keys = write_keys(
            path / "keys.json", ann=[Role.ADMIN], bob=[Role.ADMIN], guest=[Role.GENERATE], reader=[Role.OBSERVE]
        )

    @asynccontextmanager
    async def serving(self, **audit: Any) -> AsyncIterator[App]:
        quotas = {"guest": Quota(tokens_per_minute=40)}
        async with serving_demo(
            identity=IdentitySettings(api_keys=str(self.path / "keys.json"), quotas=quotas),
            policies=PolicySettings(store=self.store),
            audit=AuditSettings(folder=str(self.audit), **audit),
        ) as app:
            yield app

    def client(self, app: App, name: str) -> AsyncClient:
        return AsyncClient(f"127.0.0.1:{app.port}", api_key=self.keys[name], retries=0)

    def records(self) -> list[dict[str, Any]]:
        return [record for record, _ in read_audit(self.audit, None)]

    async def command(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        """``saeguard audit`` with these, of this folder."""
        action, *others = arguments
        code = await asyncio.to_thread(main, ["audit", action, "--folder", str(self.audit), *others])
        return code, *capsys.readouterr()

    async def verify(self, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
        return await self.command(capsys, "verify", "--store", self.store)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def refused(call: Any) -> SaeguardError:
    with pytest.raises(SaeguardError) as caught:
        await call
    return caught.value


async def numbers(client: AsyncClient) -> tuple[int, int]:
    history = await client.policy_history()
    return len(history.revisions), len(history.activations)


async def test_no_act_takes_effect_without_its_intent(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: Outcome
) -> None:
    disk = FailingDisk(monkeypatch)
    attempts = 0
    async with place.serving() as app, place.client(app, "ann") as ann:
        for value in (1.0, 2.0):
            change = await ann.apply_policies(document(value), etag=str(int(value) - 1), reason="because")
            await ann.activate_revision(int(value), expected_activation=int(value) - 1, reason="now")
        for failing in ERRORS:
            disk.failing = failing
            for act in (
                ann.apply_policies(document(9.0), etag=change.etag, reason="because"),
                ann.delete_policy("calm", etag=change.etag, reason="because"),
                ann.activate_revision(1, expected_activation=2, reason="now"),
                ann.rollback_policies(expected_activation=2, reason="now"),
            ):
                error = await refused(act)
                attempts += 1
                assert isinstance(error, Unavailable)
                assert "the audit cannot be written" in str(error)
            disk.failing = ""
            assert await numbers(ann) == (2, 2)
    kinds = Counter(record["kind"] for record in place.records())
    assert (kinds["intent"], kinds["policy"], kinds["call"]) == (4, 4, attempts)
    code, out, err = await place.verify(capsys)
    assert (code, err) == (0, "")
    assert "2 revisions and 2 activations in the store, none changed" in out
    outcome("acts on policies with a full, failing or read-only disk", "none takes effect", f"0 of {attempts}")


async def test_an_act_without_its_outcome_is_told_as_done_and_told_by_verify(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: Outcome
) -> None:
    monkeypatch.setattr("saeguard_server.audit.chain.MAX_WAITING_BYTES", 0)
    disk = FailingDisk(monkeypatch)

    def fill() -> None:
        disk.failing = "write"

    async with place.serving() as app, place.client(app, "ann") as ann:
        disk.after = fill
        change = await ann.apply_policies(document(1.0), etag="0", reason="because")
        assert change.revision.number == 1
        disk.after, disk.failing = lambda: None, ""
        await ann.activate_revision(1, expected_activation=0, reason="now")
    assert [record["kind"] for record in place.records()][:2] == ["intent", "lost"]
    code, out, err = await place.verify(capsys)
    assert (code, err) == (0, "")
    assert "1 records could not be written" in out
    assert "revision 1 is in the store, its outcome has no record: write by ann" in out
    outcome("a disk that is full between an act and its outcome", "answer and audit tell of it", "both do")


async def test_a_restart_on_a_full_disk_forgets_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: Outcome
) -> None:
    disk = FailingDisk(monkeypatch)
    for times in (1, 2):
        async with place.serving() as app, place.client(app, "guest") as guest:
            disk.failing = "write"
            await refused(guest.generate("hi"))
        _, out, _ = await place.command(capsys, "verify")
        assert f"{times} more could not be written yet, or were lost" in out
        # It starts, and is full again.
    disk.failing = ""
    async with place.serving():
        pass
    assert [(record["kind"], record.get("records")) for record in place.records()] == [("lost", 2)]
    outcome("restarts while the disk is full", "what is lost is counted", "2 of 2")


async def test_every_call_of_a_known_caller_is_in_the_audit(
    place: Place, capsys: pytest.CaptureFixture[str], outcome: Outcome
) -> None:
    sent: Counter[str] = Counter()
    async with (
        place.serving() as app,
        place.client(app, "ann") as ann,
        place.client(app, "guest") as guest,
        place.client(app, "reader") as reader,
    ):
        await refused(guest.generate("hi"))  # no policies are in force yet
        await ann.apply_policies(document(1.0), etag="0", reason="because")
        await ann.activate_revision(1, expected_activation=0, reason="now")
        await ann.apply_policies(document(1.0), etag="1", reason="the same once more")
        await refused(ann.apply_policies(document(2.0), etag="0", reason="too late"))
        await refused(ann.apply_policies({"a.yaml": "nonsense: ["}, etag="1", reason="because"))
        await ann.apply_policies(document(2.0), etag="1", dry_run=True)
        await guest.generate("The farmer", max_new_tokens=2)
        await ann.compare("The farmer", max_new_tokens=2)
        async for _ in ann.generate_stream("The farmer", max_new_tokens=2):
            pass
        await reader.activations("The old farmer", ["resid4"], top_k=2)
        await refused(reader.activations("x", ["nothing"], top_k=2))
        await refused(guest.generate("x", max_new_tokens=100))
        await refused(guest.generate("x", steer=[Zero("resid4", 9)]))
        await refused(guest.model())
        await refused(ann.generate("x", steer=[Clamp("resid4", 3, 5.0)]))
        for _ in range(3):
            await reader.saes()
        await ann.policies()
        await ann.info()
        sent["ann"], sent["guest"], sent["reader"] = 11, 5, 5
        generation = generation_service_pb2_grpc.GenerationServiceStub
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            for _ in range(50):
                with pytest.raises(grpc.aio.AioRpcError):
                    await generation(channel).Generate(pb.GenerateRequest(text="x"), metadata=bearer("sg_wrong"))
            with pytest.raises(grpc.aio.AioRpcError):
                await generation(channel).Generate(
                    pb.GenerateRequest(text="x", sampling=pb.Sampling(top_p=7)), metadata=bearer(place.keys["guest"])
                )
            sent["guest"] += 1
    records = place.records()
    calls: Counter[str] = Counter()
    for record in records:
        if record["kind"] != "intent":
            calls[record.get("caller", "unknown")] += record.get("calls", 1)
    assert calls == sent | Counter(unknown=50)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    assert [record["outcome"] for record in by_kind["request"]] == [
        "POLICIES_UNAVAILABLE", "length", "length", "length", "QUOTA_EXCEEDED", "PERMISSION_DENIED", "POLICY_REFUSED",
    ]  # fmt: skip
    assert by_kind["request"][-1]["facts"]["policy"] == "calm"
    assert by_kind["request"][-1]["field"].startswith("interventions[0]")
    assert [(record["outcome"], record.get("tokens", 0) > 2) for record in by_kind["activations"]] == [
        ("done", True), ("UNKNOWN_NAME", False),
    ]  # fmt: skip
    assert by_kind["activations"][0]["asked"]["saes"] == ["resid4"]
    assert "farmer" not in json.dumps(records)
    assert [record["outcome"] for record in by_kind["policy"]] == ["done", "done", "done", "CONFLICT"]
    assert [(record["outcome"], record.get("field")) for record in by_kind["call"]] == [
        ("INVALID_REQUEST", "documents"), ("PERMISSION_DENIED", None), ("INVALID_REQUEST", "sampling.top_p"),
    ]  # fmt: skip
    (unknown,) = by_kind["refused"]
    assert (unknown["peer"], unknown["outcome"], unknown["calls"]) == ("127.0.0.0/24", "UNAUTHENTICATED", 50)
    assert (await place.verify(capsys))[0] == 0
    outcome("calls of known callers, served and refused", "each is in the audit", f"{sum(sent.values())} of 22")


async def test_refused_calls_cannot_fill_the_disk(place: Place, is_full: bool, outcome: Outcome) -> None:
    calls = 20_000 if is_full else 300
    edits = [edit_pb.Intervention(sae="s" * 14_000, feature=number) for number in range(250)]
    for edit in edits:
        edit.zero.SetInParent()
    large = pb.GenerateRequest(text="x", interventions=edits, conversation="c" * 256)
    assert large.ByteSize() > 3_400_000
    async with place.serving() as app, grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        generate = generation_service_pb2_grpc.GenerationServiceStub(channel).Generate
        with pytest.raises(grpc.aio.AioRpcError):
            await generate(large, metadata=bearer(place.keys["ann"]))
        await asyncio.sleep(0.2)
        most = sum(file.stat().st_size for file in place.audit.glob("*.jsonl"))
        assert 0 < most < 8192
        for number in range(calls):
            with pytest.raises(grpc.aio.AioRpcError):
                await generate(pb.GenerateRequest(text="x"), metadata=bearer(f"sg_{number}"))
    size = sum(file.stat().st_size for file in place.audit.glob("*.jsonl")) - most
    minutes = sum(record["kind"] == "refused" for record in place.records())
    assert size <= SUMMARY_BYTES * minutes
    outcome("a refused request of 3.5 MB", "8 KiB of audit", f"{most} bytes")
    outcome(f"{calls} refused credentials", "500 bytes of audit a minute and network", f"{size} bytes")


async def test_two_callers_with_one_request_id_are_told_apart(
    place: Place, capsys: pytest.CaptureFixture[str], outcome: Outcome
) -> None:
    async with place.serving() as app, place.client(app, "ann") as ann, place.client(app, "bob") as bob:
        await ann.apply_policies(document(1.0), etag="0", reason="because", request_id="same")
        await ann.activate_revision(1, expected_activation=0, reason="now")
        replies = [
            await client.generate(text, max_new_tokens=2, request_id="same", seed=1)
            for client, text in ((ann, "The farmer"), (bob, "A sailor"))
        ]
        # Not even another's id, as the server gave it, makes two calls one.
        stolen = await bob.generate("Rain", max_new_tokens=2, request_id=replies[0].request_id)
        own = {reply.request_id for reply in [*replies, stolen]}
        assert len(own) == 3
        assert "same" not in own
        _, shown, _ = await place.command(capsys, "show", replies[0].request_id)
        assert [json.loads(line)["caller"] for line in shown.splitlines()] == ["ann"]
        _, shown, err = await place.command(capsys, "show", "same")
        assert [json.loads(line)["caller"] for line in shown.splitlines()] == ["ann", "ann", "ann", "bob"]
        assert err == "3 calls were named so by their callers\n"
        replay = ("replay", "--target", f"127.0.0.1:{app.port}", "--prompt", "The farmer", "--api-key-file")
        key = place.path / "key"
        key.write_text(place.keys["ann"])
        code, _, err = await place.command(capsys, *replay, str(key), "same")
        assert (code, "give the server's id" in err) == (2, True)
        code, _, err = await place.command(capsys, *replay, str(key), replies[0].request_id)
        assert (code, err) == (0, "the same as recorded\n")
    outcome("two callers who send one request id", "told apart everywhere", "3 ids for 3 calls")


async def test_who_writes_the_store_past_the_server_is_found(
    place: Place, capsys: pytest.CaptureFixture[str], outcome: Outcome
) -> None:
    async with place.serving() as app, place.client(app, "ann") as ann:
        await ann.apply_policies(document(1.0), etag="0", reason="because")
        await ann.activate_revision(1, expected_activation=0, reason="now")
    database = place.path / "policies.db"
    shutil.copy(database, place.path / "right.db")
    # A whole chain, made by our own code: only the audit does not know of it.
    store = await open_store(place.store)
    await store.write([], etag="1", author="ann", reason="because")
    await store.activate(2, actor="ann", reason="now")
    await store.close()
    code, _, err = await place.verify(capsys)
    assert code == 1
    assert re.findall(r"DIFFERS: (\w+ \d) of ann has no record", err) == ["revision 2", "activation 2"]
    # Another store, whose rows are other ones under the same numbers.
    database.unlink()
    store = await open_store(place.store)
    await store.write([], etag="0", author="ann", reason="because")
    await store.close()
    code, _, err = await place.verify(capsys)
    assert code == 1
    assert "revision 1: seal" in err
    assert "activation 1 is not in the store" in err
    # A changed row.
    shutil.copy(place.path / "right.db", database)
    with sqlite3.connect(database) as connection:
        for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute("UPDATE policy_revisions SET author = 'eve'")
    connection.close()
    code, _, err = await place.verify(capsys)
    assert (code, err.startswith("BROKEN: the policy store: row 1")) == (1, True)
    assert (await place.command(capsys, "verify", "--store", "sqlite:////nowhere/at/all"))[0] == 2
    outcome("a policy store written past the server, replaced, altered", "audit verify tells", "3 of 3")


def test_an_act_cut_off_by_a_kill_is_told(place: Place, capsys: pytest.CaptureFixture[str], outcome: Outcome) -> None:
    tables = {"audit": {"folder": str(place.audit)}, "policies": {"store": place.store}}
    with server_process(place.path, until="liveness", **tables) as server, Client(server.address) as client:
        client.apply_policies(document(1.0), etag="0", reason="because")
        # While somebody holds the store's lock, the act stands between its intent and its outcome.
        lock = sqlite3.connect(place.path / "policies.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        with pytest.raises(SaeguardError):
            client.activate_revision(1, expected_activation=0, reason="now", deadline_s=1.0)
        server.stop(signal.SIGKILL)
        lock.close()
    config = place.path / f"{server.port}.toml"
    intent = next(record for record in place.records() if record.get("act") == "activate")
    for arguments in (["verify", "--folder", str(place.audit)], ["verify", "--config", str(config)]):
        assert main(["audit", *arguments]) == 0
        assert f"an act with unknown outcome: activate by local at {intent['time']}" in capsys.readouterr().out
    assert main(["audit", "show", "--config", str(config), intent["request_id"]]) == 0
    assert "is not known" in capsys.readouterr().err
    outcome("SIGKILL between an act and its outcome", "audit verify and show tell", "both do")


@contextmanager
def small_disk(path: Path, size_kb: int) -> Iterator[None]:
    """A file system of its own. Skips where that may not be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


async def test_a_disk_that_is_really_full(place: Place, capsys: pytest.CaptureFixture[str], outcome: Outcome) -> None:
    with small_disk(place.path / "disk", 512):
        place.audit = place.path / "disk" / "audit"
        async with place.serving() as app, place.client(app, "ann") as ann, place.client(app, "guest") as guest:
            await ann.apply_policies(document(1.0), etag="0", reason="because")
            filler = place.path / "disk" / "filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            refusals = 0
            until = time.monotonic() + 20
            error: SaeguardError | None = None
            # Until the page that the file's end has is full too.
            while error is None and time.monotonic() < until:
                await refused(guest.model())
                refusals += 1
                try:
                    await ann.apply_policies(document(2.0), etag="1", dry_run=True)
                    await asyncio.sleep(0)
                    if refusals % 20 == 0:
                        await ann.delete_policy("nothing", etag="1", reason="because")
                except Unavailable as err:
                    error = err
                except SaeguardError:
                    pass
            assert error is not None
            assert "No space left" in str(error)
            assert await numbers(ann) == (1, 0)
            filler.unlink()
        told = [record for record in place.records() if record["kind"] == "call" and record["caller"] == "guest"]
        assert len(told) + sum(record.get("records", 0) for record in place.records()) == refusals
        assert (await place.verify(capsys))[0] == 0
    outcome("a file system that fills up", "acts refused, nothing lost", f"{refusals} records of {refusals}")
