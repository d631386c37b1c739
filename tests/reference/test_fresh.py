"""Our loaders against SAEs that the reference libraries have just made: other weights and sizes than any on disk."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from saeguard_sae.formats import Choices, Source
from saeguard_sae.loading import read_sae

GENERATE = Path(__file__).with_name("generate.py")
LIMIT_S = 300
TOLERANCE = 2e-5
AT_LEAST = {"saelens": 180, "dictionary_learning": 8, "sparsify": 10}


class Fresh(NamedTuple):
    """Where the cases are, and what the generator says about each."""

    folder: Path
    cases: list[dict[str, Any]]


@pytest.fixture(scope="session")
def fresh(reference_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Every case, made once."""
    folder = tmp_path_factory.mktemp("fresh")
    command = [reference_python, GENERATE, folder, "--seed", "7", "--d-in", "40", "--d-sae", "104"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return Fresh(folder, json.loads((folder / "cases.json").read_text()))


def far(ours: Tensor, theirs: np.ndarray[Any, Any]) -> bool:
    """Whether a value is off by more than the tolerance, relative to its token's largest or 1."""
    wanted = torch.from_numpy(theirs)
    scale = wanted.abs().amax(dim=-1, keepdim=True).clamp_min(1.0)
    return ours.shape != wanted.shape or not bool(((ours - wanted).abs() / scale).max() <= TOLERANCE)


def differences(path: Path, choices: dict[str, Any]) -> list[str]:
    """What of a case comes out otherwise; the refusal when it is refused."""
    try:
        coder = read_sae(Source(path, choices=Choices(**choices)))[1].dictionary
    except (ValueError, OSError) as err:
        return [str(err)]
    reference = np.load(path / "ref.npz")
    x = torch.from_numpy(reference["x"])
    features = coder.encode(x)
    ours = {"features": features, "recon": coder.decode(features, x), "forward": coder.reconstruct(x)}
    return [name for name, value in ours.items() if far(value, reference[name])]


@pytest.mark.parametrize("library", AT_LEAST)
def test_equals_what_the_library_computes(library: str, fresh: Fresh) -> None:
    cases = [case for case in fresh.cases if case["path"].startswith(library)]
    assert len(cases) >= AT_LEAST[library]
    found = {case["path"]: differences(fresh.folder / case["path"], case["choices"]) for case in cases}
    assert not {path: what for path, what in found.items() if what}


def test_features_fire_and_not_all_of_them(fresh: Fresh) -> None:
    """A comparison of zeros, or of plain matrix products, would prove nothing."""
    for case in fresh.cases:
        share = float((np.load(fresh.folder / case["path"] / "ref.npz")["features"] != 0).mean())
        assert 0.02 < share < 0.6, (case["path"], share)
