"""Only a vLLM that was tested is taken; what else is there is named."""

from __future__ import annotations

import pytest

from saeguard_server.engine.vllm import engine
from saeguard_server.settings import BadSettings


@pytest.mark.parametrize("installed", ["0.32.0", "0.32.1.post2"])
def test_tested_versions_are_taken(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "version", lambda name: installed)
    assert engine.check_version() == installed


@pytest.mark.parametrize("installed", ["0.31.2", "0.33.0", "1.0.0"])
def test_others_are_refused_by_number(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "version", lambda name: installed)
    with pytest.raises(BadSettings, match=rf"vLLM {installed} is installed; Saeguard was tested with >=0\.32,<0\.33"):
        engine.check_version()


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DISTRIBUTIONS", ("no-such-distribution",))
    with pytest.raises(BadSettings, match=r'pip install "saeguard\[vllm\]"'):
        engine.check_version()
