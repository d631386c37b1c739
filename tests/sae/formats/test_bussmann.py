"""Bussmann's repositories: what they computed from the same files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeguard_sae.dictionary import Dictionary, ReLU
from saeguard_sae.formats import bussmann
from saeguard_sae.formats.parsed import ParsedSae, Source
from saeguard_sae.models import Site
from support.near import close
from support.published.bussmann import BUILDERS, K, build, settings


def load(path: Path) -> ParsedSae:
    return bussmann.parse(Source(path))


def said(found: ParsedSae, name: str) -> str:
    return next(one.value for one in found.conventions if one.name == name)


@pytest.mark.parametrize("case", ["topk", "batchtopk_threshold", "matryoshka", "jumprelu"])
def test_equals_the_repositories(case: str, reference_saes: Path) -> None:
    folder = reference_saes / f"ext_bussmann_{case}"
    found, reference = load(folder), np.load(folder / "ref.npz")
    x = torch.from_numpy(reference["x"])
    features = found.dictionary.encode(x)
    close(features, reference["feature_acts"])
    close(found.dictionary.decode(features, x), reference["recon"])
    assert (found.reads, found.model) == (Site(8, "resid_pre"), "gpt2-small")


def test_refuses_the_reference_that_would_need_the_whole_batch(reference_saes: Path) -> None:
    with pytest.raises(ValueError, match=r"sae.pt: no threshold: .* which other tokens are in the batch. Calibrate"):
        load(reference_saes / "ext_bussmann_batchtopk")


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_the_plain_formulas(name: str, tmp_path: Path) -> None:
    published = BUILDERS[name](tmp_path, 81)
    dictionary, x = load(tmp_path).dictionary, torch.randn(60, published.d_in, dtype=torch.float64)
    assert published.reconstruct is not None
    torch.testing.assert_close(dictionary.encode(x.float()).double(), published.encode(x), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        dictionary.reconstruct(x.float()).double(), published.reconstruct(x), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("kind", ["batchtopk", "batch-topk", "matryoshka", "global-matryoshka-topk"])
def test_a_threshold_that_never_moved_is_said(kind: str, tmp_path: Path) -> None:
    build(kind, tmp_path, 82)
    assert (said(load(tmp_path), "threshold"), load(tmp_path).stated_l0) == ("1.2", K)
    torch.save(torch.load(tmp_path / "sae.pt") | {"threshold": torch.tensor(0.0)}, tmp_path / "sae.pt")
    found = load(tmp_path)
    assert said(found, "threshold") == "0: never calibrated, so the SAE is a plain ReLU"
    assert isinstance(found.dictionary, Dictionary)
    assert found.dictionary.activation == ReLU()


def test_says_what_is_not_used_and_what_is_assumed(tmp_path: Path) -> None:
    build("topk", tmp_path, 83)
    found = load(tmp_path)
    assert said(found, "b_enc").startswith("not used")
    assert said(found, "normalisation") == "layer_norm"
    assert ("processing", "not stated", "the format") in [
        (one.name, one.value, one.source) for one in found.conventions
    ]


def test_a_hook_that_is_no_site_is_left_to_the_user(tmp_path: Path) -> None:
    build("topk", tmp_path, 84)
    (tmp_path / "config.json").write_text(
        json.dumps(settings("topk", normed=True) | {"hook_point": "blocks.8.somewhere"})
    )
    assert load(tmp_path).reads is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sae_type": "quantile"}, "sae_type 'quantile' is not supported; supported are vanilla, topk"),
        ({"sae_type": "jumprelu"}, "sae.pt: no jumprelu.log_threshold"),
        ({"input_unit_norm": "True"}, "input_unit_norm must be true or false"),
        ({"top_k": 0}, "top_k must be a whole number above 0"),
        ({"act_size": 21}, "act_size is 21, but the weights have 20"),
        ({"dict_size": 40}, "dict_size is 40, but the weights have 48"),
        ({"tied_weights": True}, "unknown key 'tied_weights'"),
    ],
)
def test_refuses_what_it_does_not_understand(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    build("topk", tmp_path, 85)
    (tmp_path / "config.json").write_text(json.dumps(settings("topk", normed=True) | change))
    with pytest.raises(ValueError, match=says):
        load(tmp_path)
