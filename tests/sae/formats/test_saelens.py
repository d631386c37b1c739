"""SAELens' format: what SAELens computed from the same files, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeguard_sae.formats import saelens
from saeguard_sae.loading import LoadError, load
from saeguard_sae.site import POINTS, Site
from support.saes import ARCHITECTURES, plain_sae, save_sae

DATA = Path(__file__).parent / "data" / "saelens"
CASES = sorted(path.name for path in DATA.iterdir())
# Cases of the larger reference that use only conventions supported here.
SHARED_CASES = (
    "sl_standard_none_bdec0",
    "sl_standard_none_bdec1",
    "sl_jumprelu_none_bdec0",
    "sl_jumprelu_none_bdec1",
    "sl_jumprelu_negative_thresholds",
    "sl_gated_none_bdec0",
    "sl_gated_none_bdec1",
    "sl_topk_none_bdec0_rescale0",
    "sl_topk_none_bdec0_rescale1",
    "sl_topk_none_bdec1_rescale0",
    "sl_topk_none_bdec1_rescale1",
    "sl_topk_fewer_than_k_positive",
    "sl_batchtopk_rescale0_inference",
    "sl_batchtopk_rescale1_inference",
    "sl_matryoshka_batchtopk_rescale1_inference",
)


def close(ours: Tensor, theirs: np.ndarray[Any, Any]) -> None:
    """2e-5 relative to each token's largest value."""
    wanted = torch.from_numpy(theirs).float()
    scale = wanted.abs().amax(dim=-1, keepdim=True).clamp_min(1.0)
    assert float(((ours - wanted).abs() / scale).max()) <= 2e-5


@pytest.mark.parametrize("case", CASES)
def test_equals_saelens(case: str) -> None:
    found, reference = saelens.load(DATA / case), np.load(DATA / case / "ref.npz")
    features = found.dictionary.encode(torch.from_numpy(reference["x"]))
    close(features, reference["features"])
    close(found.dictionary.decode(features), reference["recon"])
    assert found.site == Site(1, "resid_post")


@pytest.mark.parametrize("case", SHARED_CASES)
def test_equals_the_larger_reference(case: str, reference_saes: Path) -> None:
    found, reference = saelens.load(reference_saes / case), np.load(reference_saes / case / "ref.npz")
    features = found.dictionary.encode(torch.from_numpy(reference["x"]))
    close(features, reference["feature_acts"])
    close(found.dictionary.decode(features), reference["recon"])


def test_everything_else_in_the_larger_reference_is_refused_by_name(reference_saes: Path) -> None:
    others = [path for path in sorted(reference_saes.glob("sl*_*")) if path.name not in SHARED_CASES]
    refused = 0
    for path in others:
        if not saelens.recognises(path):
            continue
        if "_training" in path.name or any(
            half in path.name
            for half in (
                "float16",
                "expected_average_folded",
                "whitening_folded",
                "hookz_standard_none",
                "hookz_jumprelu_none",
            )
        ):
            continue
        with pytest.raises(ValueError, match=r"cfg.json|sae_weights"):
            saelens.load(path)
        refused += 1
    assert refused > 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("centre", [True, False])
def test_equals_the_plain_formulas(architecture: str, centre: bool, tmp_path: Path) -> None:
    plain = plain_sae(architecture, 20, 50, seed=31, centre=centre)
    save_sae(plain, tmp_path, "blocks.0.hook_mlp_out", centre=centre)
    dictionary = saelens.load(tmp_path).dictionary
    x = torch.randn(40, 20)
    torch.testing.assert_close(dictionary.encode(x), plain.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        dictionary.decode(dictionary.encode(x)), plain.decode(plain.encode(x)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saving_and_loading_gives_the_same(architecture: str, tmp_path: Path) -> None:
    save_sae(plain_sae(architecture, 20, 50, seed=32), tmp_path / "a", "blocks.0.hook_resid_post")
    first = saelens.load(tmp_path / "a").dictionary
    saelens.save(first, tmp_path / "b", site=Site(4, "mlp_out"), model_name="tiny")
    second = saelens.load(tmp_path / "b")
    assert second.site == Site(4, "mlp_out")
    x = torch.randn(9, 20)
    assert torch.equal(first.encode(x), second.dictionary.encode(x))
    assert torch.equal(first.W_dec, second.dictionary.W_dec)


@pytest.mark.parametrize("point", POINTS)
def test_every_site_has_a_hook_name_that_reads_back(point: Any, tmp_path: Path) -> None:
    site = Site(0 if point == "embed" else 7, point)
    save_sae(plain_sae("standard", 4, 8, seed=33), tmp_path, saelens.hook_name(site))
    assert saelens.load(tmp_path).site == site


def edit_config(path: Path, change: dict[str, Any]) -> None:
    config = json.loads((path / "cfg.json").read_text())
    metadata = config["metadata"] | change.pop("metadata", {})
    (path / "cfg.json").write_text(json.dumps(config | {"metadata": metadata} | change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"reshape_activations": "sideways"}, "reshape_activations"),
        ({"architecture": "temporal"}, "architecture 'temporal' is not supported"),
        ({"architecture": "jumprelu"}, "needs 'threshold'"),
        ({"d_sae": 9}, "d_sae is 9, but the weights have 8"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"metadata": {"hook_head_index": 3}}, "hook_head_index"),
        ({"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}}, "center_writing_weights"),
        ({"metadata": {"hook_name": "somewhere"}}, "give the site"),
    ],
)
def test_refuses_what_it_does_not_understand(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    save_sae(plain_sae("standard", 4, 8, seed=34), tmp_path, "blocks.0.hook_resid_post")
    edit_config(tmp_path, change)
    with pytest.raises(LoadError, match=says):
        load("mine", tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    save_sae(plain_sae("standard", 4, 8, seed=35), tmp_path, "blocks.0.hook_resid_post")
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["b_enc"][3] = bad
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with pytest.raises(LoadError, match="b_enc holds values that are not finite"):
        load("mine", tmp_path)


def test_refuses_missing_and_surplus_weights(tmp_path: Path) -> None:
    save_sae(plain_sae("standard", 4, 8, seed=36), tmp_path, "blocks.0.hook_resid_post")
    weights = load_file(tmp_path / "sae_weights.safetensors")
    save_file(weights | {"scaling_factor": torch.ones(8)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(LoadError, match=r"unexpected \['scaling_factor'\]"):
        load("mine", tmp_path)
    del weights["b_enc"]
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with pytest.raises(LoadError, match="no b_enc"):
        load("mine", tmp_path)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 2000), name=st.sampled_from(["cfg.json", "sae_weights.safetensors"]))
def test_a_damaged_file_is_refused_and_nothing_else(
    cut: int, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = tmp_path_factory.mktemp("whole")
    save_sae(plain_sae("standard", 4, 8, seed=37), whole, "blocks.0.hook_resid_post")
    data = (whole / name).read_bytes()
    (whole / name).write_bytes(data[: cut % len(data)])
    with pytest.raises(LoadError):
        load("mine", whole)
    shutil.rmtree(whole)


def test_other_folders_are_refused_with_the_known_formats(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="known are saelens"):
        load("mine", tmp_path)
    with pytest.raises(LoadError, match="no such folder"):
        load("mine", tmp_path / "nowhere")
