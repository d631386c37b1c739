"""API keys at the door: right, wrong, ended; followed as the file changes; and what a check costs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from saeguard_server.caller import Credentials, Quota, Role
from saeguard_server.errors import Overloaded, Unauthenticated
from saeguard_server.identity import api_keys
from saeguard_server.identity.api_keys import ApiKeyAuthenticator, KeyFile, KeyRecord, change_keys, make_key, revoke_key
from saeguard_server.settings import BadSettings
from support.credentials import CHEAP, write_keys


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ids of the keys that were put through scrypt."""
    seen: list[str] = []
    matches = KeyRecord.matches

    def counted(self: KeyRecord, secret: str) -> bool:
        seen.append(self.id)
        return matches(self, secret)

    monkeypatch.setattr(KeyRecord, "matches", counted)
    return iter([seen])  # type: ignore[return-value]


def opened(path: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> ApiKeyAuthenticator:
    return ApiKeyAuthenticator(path, lambda name: Quota(max_features=len(name)), now)


def shown(key: str) -> Credentials:
    return Credentials(authorization=(f"Bearer {key}",))


async def refused(keys: ApiKeyAuthenticator, key: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await keys.caller(shown(key))
    return caught.value.message


async def test_a_key_is_its_caller(path: Path) -> None:
    made = write_keys(path, billing=[Role.GENERATE, Role.STEER])
    keys = opened(path)
    caller = await keys.caller(shown(made["billing"]))
    assert (caller.name, caller.roles, caller.quota) == (
        "billing", {Role.GENERATE, Role.STEER}, Quota(max_features=7)
    )  # fmt: skip


async def test_wrong_keys_are_refused_alike(path: Path) -> None:
    made = write_keys(path, a=[Role.GENERATE], b=[Role.GENERATE])
    keys = opened(path)
    other_id = f"sg_{'0' * 16}_{made['a'].split('_', 2)[2]}"
    swapped = f"{made['a'][:20]}{made['b'][20:]}"
    for key in ("sg_", "sg_x", made["a"][:-1], f"{made['a']}x", other_id, swapped, made["a"].upper()):
        said = await refused(keys, key)
        assert said == "the API key is not known"
        assert key not in said or key == "sg_"


async def test_ended_keys_say_so_to_their_holder_alone(path: Path) -> None:
    now = datetime.now(UTC)
    key, record = make_key("a", (Role.GENERATE,), (), now + timedelta(hours=1), cost=CHEAP)
    change_keys(path, lambda _: KeyFile(keys=(record,)))
    at = [now]
    keys = opened(path, lambda: at[0])
    assert (await keys.caller(shown(key))).name == "a"
    at[0] += timedelta(hours=2)
    assert await refused(keys, key) == "the API key is expired"
    at[0] = now
    change_keys(path, lambda old: revoke_key(old, record.id))
    assert await refused(keys, key) == "the API key is revoked"
    assert await refused(keys, f"{key[:-1]}{'A' if key[-1] != 'A' else 'B'}") == "the API key is not known"


async def test_the_file_is_followed_without_a_restart(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = write_keys(path, a=[Role.GENERATE])
    keys = opened(path)
    assert (await keys.caller(shown(made["a"]))).name == "a"
    later = write_keys(path, b=[Role.OBSERVE])
    assert (await keys.caller(shown(later["b"]))).roles == {Role.OBSERVE}
    assert "API keys read again" in caplog.text


@pytest.mark.parametrize("spoilt", ["gone", "half", "open to all"])
async def test_a_file_that_cannot_be_used_changes_nothing(
    path: Path, spoilt: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = write_keys(path, a=[Role.GENERATE])
    keys, whole = opened(path), path.read_bytes()
    if spoilt == "gone":
        path.unlink()
    elif spoilt == "half":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        write_keys(path, b=[Role.GENERATE])
        path.chmod(0o644)
    assert (await keys.caller(shown(made["a"]))).name == "a"
    assert "API keys cannot be read, the old ones stay" in caplog.text
    path.unlink(missing_ok=True)
    later = write_keys(path, c=[Role.GENERATE])
    assert (await keys.caller(shown(later["c"]))).name == "c"
    assert "not known" in await refused(keys, made["a"])


async def test_a_file_whose_mode_was_mended_is_read_again(path: Path) -> None:
    write_keys(path, a=[Role.GENERATE])
    keys = opened(path)
    key = write_keys(path, b=[Role.GENERATE])["b"]
    path.chmod(0o644)
    assert "not known" in await refused(keys, key)
    path.chmod(0o600)
    assert (await keys.caller(shown(key))).name == "b"


async def test_a_kubernetes_secret_is_followed(tmp_path: Path) -> None:
    """There the file is a link to a link, and an update moves the second."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    made = {name: write_keys(tmp_path / name / "keys.json", **{name: [Role.GENERATE]})[name] for name in ("one", "two")}
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    keys = opened(tmp_path / "keys.json")
    assert (await keys.caller(shown(made["one"]))).name == "one"
    (tmp_path / "..next").symlink_to("two")
    os.replace(tmp_path / "..next", tmp_path / "..data")
    assert (await keys.caller(shown(made["two"]))).name == "two"
    assert "not known" in await refused(keys, made["one"])


def test_at_the_start_the_file_must_be_there(path: Path) -> None:
    with pytest.raises(BadSettings, match="No such file"):
        opened(path)


async def test_a_key_is_checked_once_and_again_after_the_file_changed(path: Path, checks: Iterator[list[str]]) -> None:
    (seen,) = checks
    made = write_keys(path, a=[Role.GENERATE])
    keys = opened(path)
    await asyncio.gather(*(keys.caller(shown(made["a"])) for _ in range(50)))
    await keys.caller(shown(made["a"]))
    assert len(seen) == 1
    write_keys(path, b=[Role.GENERATE])
    await keys.caller(shown(made["a"]))
    assert len(seen) == 2
    for _ in range(3):
        await refused(keys, f"{made['a'][:-2]}AA")
    assert len(seen) == 5, "wrong secrets are not remembered"


async def test_what_is_remembered_is_bounded(
    path: Path, checks: Iterator[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (seen,) = checks
    monkeypatch.setattr(api_keys, "MAX_VERIFIED", 2)
    made = write_keys(path, a=[], b=[], c=[])
    keys = opened(path)
    for name in ("a", "b", "a", "c", "a", "b"):
        await keys.caller(shown(made[name]))
    assert len(seen) == 4, "b was used longest ago when c came"


async def test_guesses_do_not_pile_up(path: Path) -> None:
    made = write_keys(path, a=[])
    keys = opened(path)
    await keys.caller(shown(made["a"]))
    guesses = [f"{made['a'][:-3]}{number:03d}" for number in range(100, 200)]
    calls = [asyncio.create_task(keys.caller(shown(one))) for one in guesses]
    await asyncio.sleep(0)
    assert (await keys.caller(shown(made["a"]))).name == "a", "whoever is known does not wait behind them"
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(end, Overloaded) for end in ends) == 100 - api_keys.MAX_CHECKS
    assert sum(isinstance(end, Unauthenticated) for end in ends) == api_keys.MAX_CHECKS
    assert keys._running == 0
