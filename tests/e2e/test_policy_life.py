"""The bundled model under a policy, from the command line: what README shows, with fewer answers."""

from __future__ import annotations

import sys

import pytest

from saeguard_server.demo import policy_life


def test_a_policys_life(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["policy_life", "--generations", "48"])
    code = policy_life.main()
    said = capsys.readouterr().out
    assert code == 0, said
    assert "Every phase did what it should." in said
    assert "none changed or missing" in said
