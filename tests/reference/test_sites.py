"""Every site is TransformerLens' hook of that place: the same tensor, and the same effect of a vector added there."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_sites_equal_transformer_lens(model_type: str, reference_python: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'sae'}:{ROOT / 'tests'}", "PYTHONWARNINGS": "ignore"}
    command = [reference_python, Path(__file__).with_name("sites.py"), model_type]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    plain, processed = [one for one in lines if "site" in one], [one for one in lines if "processed" in one]
    assert len(plain) >= 9
    assert len(processed) >= 9
    for one in plain:
        assert one["activation"] <= 2e-6, one
        assert one["steered"] <= 2e-5, one
        assert one["effect"] > 0.5, one
    for one in processed:
        assert one["activation"] <= 2e-5, one
