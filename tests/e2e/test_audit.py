"""A request in the audit of a real server: shown, run again with the same tokens, and missed when it is another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saeguard_client import Apply, Client, Condition, Scale, Scope, Trigger, Window, Zero
from saeguard_client.cli import main
from saeguard_server.demo.show import serve_process


def saeguard(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    return code, *capsys.readouterr()


def test_a_request_is_recorded_and_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "audit")
    (tmp_path / "settings.toml").write_text(f'[audit]\nfolder = "{folder}"\ntext = "hash"\nrequired = true\n')
    asked: dict[str, Any] = {
        "steer": [Scale("resid2", 62, -1.0, scope=Scope(phase="generated"))],
        "triggers": [
            Trigger("t", Condition.on("resid2", 3, 0.5, window=Window("k_of_n", 4, 2)), Apply([Zero("resid4", 9)]))
        ],
        "max_new_tokens": 16,
        "temperature": 0.9,
    }
    with serve_process("--config", str(tmp_path / "settings.toml")) as server:
        with Client(server.target) as client:
            done = client.generate("The old farmer", request_id="mine", **asked)
            client.generate("Another one", request_id="other", max_new_tokens=2)
        told = json.loads(saeguard(capsys, "audit", "show", "--folder", folder, "mine")[1].splitlines()[-1])
        again = ("--target", server.target, "audit", "replay", "--folder", folder, "mine", "--prompt")
        code, out, err = saeguard(capsys, *again, "The old farmer")
        assert (code, out, err) == (0, f"{done.text}\n", "the same as recorded\n")
        code, _, err = saeguard(capsys, *again, "The old sailor and his dog")
        assert code == 1
        assert "DIFFERS: prompt tokens" in err
        assert saeguard(capsys, *again[:-2], "nobody", "--prompt", "x")[0] == 2
    assert (told["outcome"], told["seed"], told["generated_tokens"]) == (
        done.finish_reason,
        done.seed,
        len(done.tokens),
    )
    assert [(one["feature"], one["kind"]) for one in told["edits"]] == [(62, "scale"), (9, "zero")]
    assert "farmer" not in (tmp_path / "audit" / "audit-00000001.jsonl").read_text()
    code, out, _ = saeguard(capsys, "audit", "verify", "--folder", folder)
    assert (code, out.split()[0]) == (0, "8")
    head = out.splitlines()[1].removeprefix("head ")
    assert saeguard(capsys, "audit", "verify", "--folder", folder, "--head", head)[0] == 0
    path = tmp_path / "audit" / "audit-00000001.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert saeguard(capsys, "audit", "verify", "--folder", folder, "--head", head)[0] == 1
