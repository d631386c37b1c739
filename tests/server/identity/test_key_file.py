"""Keys and their file: what is stored, who may read it, and that it is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from saeguard_server import cli
from saeguard_server.caller import Role
from saeguard_server.identity import api_keys
from saeguard_server.identity.api_keys import KEY, KeyFile, change_keys, make_key, read_keys, revoke_key
from saeguard_server.settings import BadSettings
from support.credentials import CHEAP, write_keys


def test_the_hash_is_scrypt_as_the_standard_library_has_it() -> None:
    key, record = make_key("a", (Role.GENERATE,), (), None)
    found = KEY.fullmatch(key)
    assert found is not None
    assert found[1] == record.id
    _, n, r, p, salt, digest = record.hash.split("$")
    again = hashlib.scrypt(found[2].encode(), salt=b64decode(salt), n=int(n), r=int(r), p=int(p), dklen=32)
    assert (int(n), int(r), int(p), again) == (2**14, 8, 1, b64decode(digest))
    assert record.matches(found[2])
    assert not record.matches(found[2][:-1] + ("A" if found[2][-1] != "A" else "B"))


def test_no_two_keys_are_alike_and_none_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = write_keys(path, a=[Role.ADMIN], b=[Role.GENERATE])
    text = path.read_text()
    for key in keys.values():
        assert key.split("_", 2)[2] not in text
    assert keys["a"] != keys["b"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602, 0o666])
def test_a_file_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, a=[Role.GENERATE])
    path.chmod(mode)
    with pytest.raises(BadSettings, match="others may read or change it"):
        read_keys(path)
    path.chmod(0o440)
    assert read_keys(path).keys


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "truncated"),
        ("{", "truncated"),
        ('{"keys": [{}]}', "id"),
        ('{"key": []}', "unknown field"),
        ('{"keys": [{"id": "0123456789abcdef", "name": "a", "roles": ["root"], "created": "2026-01-01T00:00:00Z", '
         '"hash": "x"}]}', "roles"),
        ('{"keys": [{"id": "0123456789abcdef", "name": "a", "roles": [], "created": "2026-01-01T00:00:00Z", '
         '"hash": "md5$x"}]}', "hash"),
        ('{"keys": [{"id": "0123456789abcdef", "name": "a", "roles": [], "created": "2026-01-01T00:00:00", '
         '"hash": "x"}]}', "time zone"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_keys_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.json"
    path.touch(mode=0o600)
    path.write_text(text)
    with pytest.raises(BadSettings, match=re.escape(str(path))) as caught:
        read_keys(path)
    assert said in str(caught.value)


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, a=[Role.GENERATE])
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(BadSettings, match="No space"):
        write_keys(path, b=[Role.GENERATE])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["keys.json"]


def test_changes_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    threads = [threading.Thread(target=write_keys, args=(path,), kwargs={f"n{i}": [Role.GENERATE]}) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.name for one in read_keys(path).keys} == {f"n{i}" for i in range(8)}


def test_mode_and_owner_stay(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, a=[Role.GENERATE])
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 4321)
    owner = path.stat().st_uid
    write_keys(path, b=[Role.GENERATE])
    assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o640, owner)


def test_a_key_ends_when_it_is_revoked_or_expires() -> None:
    now = datetime.now(UTC)
    _, record = make_key("a", (), (), now + timedelta(days=1), cost=CHEAP)
    assert record.why_invalid(now) is None
    assert record.why_invalid(now + timedelta(days=1)) == "expired"
    (revoked,) = revoke_key(KeyFile(keys=(record,)), record.id).keys
    assert revoked.why_invalid(now) == "revoked"
    with pytest.raises(BadSettings, match="no key has the id"):
        revoke_key(KeyFile(keys=(record,)), "f" * 16)


def saeguard_key(*arguments: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_key(parser.add_subparsers())
    parsed = parser.parse_args(["key", *arguments])
    code: int = parsed.run(parsed)
    return code


def test_the_command_line_shows_a_key_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "SCRYPT_N", CHEAP)
    path = str(tmp_path / "keys.json")
    flags = ["--role", "generate", "--role", "steer", "--tag", "prod", "--expires", "90d", "--file", path]
    assert saeguard_key("create", "billing", *flags) == 0
    made = capsys.readouterr()
    found = KEY.fullmatch(made.out.strip())
    assert found is not None
    (record,) = json.loads(Path(path).read_text())["keys"]
    assert (record["name"], record["roles"], record["tags"]) == ("billing", ["generate", "steer"], ["prod"])
    assert saeguard_key("list", "--file", path) == 0
    listed = capsys.readouterr()
    assert listed.out.startswith(f"{found[1]}  billing  generate,steer  prod  ")
    assert saeguard_key("revoke", found[1], "--file", path) == 0
    assert saeguard_key("list", "--file", path) == 0
    ended = capsys.readouterr()
    assert ended.out.rstrip().endswith("revoked")
    assert found[2] not in made.err + listed.out + listed.err + ended.out + ended.err
    assert saeguard_key("revoke", "0" * 16, "--file", path) == 2
    assert saeguard_key("list", "--file", str(tmp_path / "none.json")) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("saeguard key: ")


@pytest.mark.parametrize("when", ["0d", "soon", "2020-01-01T00:00Z", "2199-01-01"])
def test_an_end_that_is_none_is_refused(when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        saeguard_key("create", "a", "--role", "admin", "--expires", when, "--file", str(tmp_path / "k.json"))
    assert "must be such as 12h" in capsys.readouterr().err


def test_a_new_file_may_not_be_there_yet_but_its_folder_must(tmp_path: Path) -> None:
    with pytest.raises(BadSettings):
        change_keys(tmp_path / "none" / "keys.json", lambda keys: keys)
