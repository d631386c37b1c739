"""Loading holds one copy of an SAE, and what is mapped from a file is shared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saeguard_sae.loading import open_sae

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
D_IN, D_SAE = 1024, 12_288
PROGRAM = """
import json, sys
from pathlib import Path
from saeguard_sae.loading import open_sae

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

before = memory("VmRSS")
weights = open_sae("one", Path(sys.argv[1])).parsed.dictionary.tensors().values()
size = sum(one.numel() * one.element_size() for one in weights)
print(json.dumps({"peak": memory("VmHWM") - before, "size": size}))
"""


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        "W_enc": torch.randn(D_IN, D_SAE, generator=g),
        "W_dec": torch.randn(D_SAE, D_IN, generator=g),
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(D_IN),
    }


def write_saelens(path: Path) -> None:
    save_file(weights(), path / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_post"}
    config = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": metadata}
    (path / "cfg.json").write_text(json.dumps(config))


def write_gemma_scope(path: Path) -> None:
    named = {name: one.numpy() for name, one in weights().items()}
    np.savez(path / "params.npz", **named, threshold=np.zeros(D_SAE, dtype=np.float32))


@pytest.mark.parametrize("write", [write_saelens, write_gemma_scope])
def test_the_peak_of_loading_is_the_size_of_the_sae(write: object, tmp_path: Path) -> None:
    assert callable(write)
    write(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["size"] > 90 * 2**20
    assert found["peak"] <= 1.2 * found["size"], found["peak"] / found["size"]


def test_decoders_of_one_file_are_one_mapping(tmp_path: Path) -> None:
    write_saelens(tmp_path)
    for _ in range(2):
        dictionary = open_sae("one", tmp_path).parsed.dictionary
        where = dictionary.W_dec.data_ptr()  # type: ignore[union-attr]
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "sae_weights" in line]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
        assert any(start <= where < end for start, end in spans), "the decoder is a copy, not the file itself"
