"""OpenAI's sparse_autoencoder: what it computed from the same files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeguard_sae.formats import openai
from saeguard_sae.formats.parsed import ParsedSae, Source
from support.near import close
from support.published.openai import BUILDERS, build, held


def load(file: Path) -> ParsedSae:
    return openai.parse(Source(file))


@pytest.mark.parametrize("case", ["relu_v1", "topk_v5"])
def test_equals_the_library(case: str, reference_saes: Path) -> None:
    folder = reference_saes / f"ext_openai_{case}"
    found, reference = load(folder / "6.pt"), np.load(folder / "ref.npz")
    x = torch.from_numpy(reference["x"])
    features = found.dictionary.encode(x)
    close(features, reference["feature_acts"])
    close(found.dictionary.decode(features, x), reference["recon"])
    assert found.reads is None


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_the_plain_formulas(name: str, tmp_path: Path) -> None:
    published = BUILDERS[name](tmp_path, 91)
    dictionary, x = load(published.path).dictionary, torch.randn(60, published.d_in, dtype=torch.float64)
    assert published.reconstruct is not None
    torch.testing.assert_close(dictionary.encode(x.float()).double(), published.encode(x), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        dictionary.reconstruct(x.float()).double(), published.reconstruct(x), rtol=2e-5, atol=2e-5
    )


def test_identity_after_topk_keeps_negative_features(tmp_path: Path) -> None:
    file = build("TopK", tmp_path, 92, after="Identity").path
    x = torch.randn(200, 20)
    assert bool((load(file).dictionary.encode(x) < 0).any())
    assert not bool((load(build("TopK", tmp_path, 92).path).dictionary.encode(x) < 0).any())


def test_recognises_a_torch_file_by_its_names_alone(tmp_path: Path) -> None:
    assert openai.recognises(build("ReLU", tmp_path, 93).path)
    assert not openai.recognises(tmp_path)
    torch.save({"encoder.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    assert not openai.recognises(tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes(b"not a torch file")
    assert not openai.recognises(tmp_path / "broken.pt")


def test_the_libraries_default_is_relu(tmp_path: Path) -> None:
    published = build("ReLU", tmp_path, 94)
    found = {name: one for name, one in held("ReLU", 94).items() if not name.startswith("activation")}
    torch.save(found, published.path)
    assert load(published.path).conventions[0].source == "the library's default"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": "GELU"}, "6.pt: activation 'GELU' is not supported; supported are ReLU, TopK"),
        ({"activation_state_dict": 3}, "activation_state_dict must hold k and postact_fn, got 3"),
        ({"activation_state_dict": {"k": True, "postact_fn": "ReLU"}}, "k must be a number, got True"),
        ({"activation_state_dict": {"k": 6, "postact_fn": "Tanh"}}, "postact_fn 'Tanh' is not supported"),
        ({"encoder.weight": torch.ones(20, 48)}, r"encoder.weight has shape \(20, 48\), expected \(48, 20\)"),
        ({"encoder.bias": torch.ones(48)}, "unexpected 'encoder.bias'"),
        ({"pre_bias": "zeros"}, "pre_bias is not a tensor"),
    ],
)
def test_refuses_what_it_does_not_understand(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    torch.save(held("TopK", 95) | change, tmp_path / "6.pt")
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "6.pt")
