"""The container's health check: its exit code is all that matters."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from saeguard_server import probe


async def probed(*arguments: str) -> int:
    return await asyncio.to_thread(probe.main, list(arguments))


async def test_serving_is_zero_and_everything_else_is_one(app_with: Any, engine: Any, capsys: Any) -> None:
    async with app_with() as app:
        target = f"127.0.0.1:{app.port}"
        await asyncio.sleep(0.1)
        assert await probed(target) == 0
        engine.ready = False
        await asyncio.sleep(0.4)
        assert await probed(target) == 1
        assert "NOT_SERVING" in capsys.readouterr().err
        assert await probed(target, "--service", "liveness") == 0
        assert await probed(target, "--service", "made.up") == 1
    assert await probed(target, "--timeout-s", "0.5") == 1
    assert await probed(target, "--ca", "none.pem") == 1


def test_help_names_the_exit_codes(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        probe.main(["--help"])
    assert "Exits 0 on SERVING" in capsys.readouterr().out
