"""Temporal SAEs as published: what SAELens computed from the same files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from saeguard_sae.formats import temporal_repo
from saeguard_sae.formats.parsed import ParsedSae, SaeOrigin, Source
from saeguard_sae.models import Site
from support.near import close
from support.published.temporal_repo import BUILDERS, build, settings

REPO = "canrager/temporalSAEs"


def load(path: Path, place: str = "gemma-2-2B/layer_12/temporal") -> ParsedSae:
    return temporal_repo.parse(Source(path, SaeOrigin(REPO, place)))


def test_equals_saelens(reference_saes: Path) -> None:
    case = reference_saes / "temporal_repo_format"
    coder, arrays = load(case / "g" / "layer_12" / "temporal").dictionary, np.load(case / "ref.npz")
    reference = {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}
    features = coder.encode(reference["x"])
    close(features, reference["feature_acts"])
    close(coder.decode(features), reference["recon"])
    close(coder.reconstruct(reference["x"]), reference["forward"])


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_the_plain_formulas(name: str, tmp_path: Path) -> None:
    published = BUILDERS[name](tmp_path, 131)
    coder, x = load(tmp_path).dictionary, torch.randn(30, published.d_in, dtype=torch.float64)
    assert published.reconstruct is not None
    assert float(published.encode(x).amax()) > 0.3, "features so small would hide a difference"
    close(coder.encode(x.float()), published.encode(x))
    close(coder.reconstruct(x.float()), published.reconstruct(x))


def test_the_layer_is_in_the_repositorys_path(tmp_path: Path) -> None:
    build(tmp_path, 132)
    found = load(tmp_path)
    assert (found.reads, found.model) == (Site(12, "resid_post"), "google/gemma-2-2b")
    assert load(tmp_path, "elsewhere").reads is None
    assert temporal_repo.parse(Source(tmp_path)).reads is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sae_type": "relu"}, "sae_type 'relu' is not supported; supported are temporal"),
        ({"sae_diff_type": "batchtopk"}, "sae_diff_type 'batchtopk' is not supported"),
        ({"tied_weights": "yes"}, "tied_weights must be true or false"),
        ({"tied_weights": False}, "latest_ckpt.safetensors: no E"),
        ({"n_attn_layers": 2}, "no attn_layers.1.k_ctx.weight"),
        ({"exp_factor": 2}, r"D has shape \(48, 20\), expected \(40, 20\)"),
        ({"bottleneck_factor": 2}, r"attn_layers.0: k_ctx.weight has shape \(16, 48\), expected \(24, 48\)"),
        ({"n_heads": 5}, r"n_heads \(5\) does not divide"),
        ({"kval_topk": 60}, "k must be 1 to d_sae"),
        ({"scaling_factor": 0}, "scaling_factor must be above 0"),
        ({"scaling_factor": None}, "scaling_factor must be a number"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_refuses_what_it_does_not_understand(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    build(tmp_path, 133)
    (tmp_path / "conf.yaml").write_text(yaml.safe_dump(settings(**change)))
    with pytest.raises(ValueError, match=says):
        load(tmp_path)


def test_refuses_an_encoder_that_tied_weights_leave_unused(tmp_path: Path) -> None:
    published = build(tmp_path, 134)
    save_file(load_file(published.weights) | {"E": torch.ones(20, 48)}, published.weights)
    with pytest.raises(ValueError, match="unexpected 'E'"):
        load(tmp_path)
