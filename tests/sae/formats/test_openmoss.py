"""OpenMOSS since 2025: what its own code and SAELens computed from the same files, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saeguard_sae.formats import openmoss
from saeguard_sae.formats.parsed import Choices, ParsedSae, Source
from saeguard_sae.models import Site
from support.near import close
from support.published.openmoss import BUILDERS, linear, plain


def load(path: Path, **choices: Any) -> ParsedSae:
    return openmoss.parse(Source(path, None, Choices(**choices)))


def said(found: ParsedSae, name: str) -> tuple[str, str]:
    return next((one.value, one.source) for one in found.conventions if one.name == name)


@pytest.mark.parametrize(
    "case",
    [
        "llamascope_r1_distill/R1/L15R",
        "ext_openmoss_head_jumprelu_decnorm",
        "ext_openmoss_head_jumprelu_plain",
        "ext_openmoss_head_relu",
        "ext_openmoss_head_topk_decnorm",
    ],
)
def test_equals_the_reference(case: str, reference_saes: Path) -> None:
    reference = np.load(reference_saes / case.split("/")[0] / "ref.npz")
    dictionary, x = load(reference_saes / case).dictionary, torch.from_numpy(reference["x"])
    features = dictionary.encode(x)
    close(features, reference["feature_acts"])
    close(dictionary.decode(features, x), reference["recon"])


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_the_plain_formulas(name: str, tmp_path: Path) -> None:
    published = BUILDERS[name](tmp_path, 51)
    dictionary, x = load(tmp_path, **published.choices).dictionary, torch.randn(60, published.d_in)
    torch.testing.assert_close(dictionary.encode(x).double(), published.encode(x.double()), rtol=2e-5, atol=2e-5)
    assert published.reconstruct is not None
    wanted = published.reconstruct(x.double())
    torch.testing.assert_close(dictionary.reconstruct(x).double(), wanted, rtol=2e-5, atol=2e-5)


def test_an_sae_reads_and_writes_one_place_and_a_transcoder_two(tmp_path: Path) -> None:
    BUILDERS["openmoss_topk_transcoder"](tmp_path, 1)
    found = load(tmp_path)
    assert (found.reads, found.writes) == (Site(3, "mlp_normalized"), (Site(3, "mlp_out"),))
    assert found.dictionary.is_transcoder
    assert said(found, "activation scale of what it writes")[0] == f"{20**0.5 / 2.40625:g}"
    plain(tmp_path, 1)
    assert (load(tmp_path).reads, load(tmp_path).writes) == (Site(3, "resid_post"), ())


def test_saelens_gates_r1_distill_without_the_decoders_norm(tmp_path: Path) -> None:
    linear(tmp_path, 2, included=True)
    value, source = said(load(tmp_path), "gating")
    assert (
        value == "saelens: p > threshold, as dashboards were made; OpenMOSS' own rule is p * |decoder row| > threshold"
    )
    assert source == "the format"
    assert load(tmp_path, gating="openmoss").used == {"gating", "scale"}
    x = torch.randn(200, 20)
    ours, theirs = (load(tmp_path, gating=rule).dictionary.encode(x) for rule in ("saelens", "openmoss"))
    assert bool(((ours > 0) != (theirs > 0)).any())


@pytest.mark.parametrize("name", ["openmoss_jumprelu", "openmoss_topk_transcoder"])
def test_the_current_spelling_has_one_rule(name: str, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path, 3)
    assert load(tmp_path, gating="saelens").used == {"scale"}  # refused by whoever gave it: nothing used it
    assert said(load(tmp_path), "decoder norm counts in the gate") == (
        "yes",
        "config.json: sparsity_include_decoder_norm",
    )


def test_ranked_features_keep_their_own_units(tmp_path: Path) -> None:
    BUILDERS["openmoss_topk_transcoder"](tmp_path, 4)
    decoder = load_file(tmp_path / "sae_weights.safetensors")["W_D"]
    found = load(tmp_path).dictionary
    torch.testing.assert_close(found.W_dec * (20**0.5 / 2.40625), decoder)
    torch.testing.assert_close(found.activation.parameters()["gain"], 1 / decoder.norm(dim=1))


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk"])
def test_a_dead_decoder_row_does_no_harm(act_fn: str, tmp_path: Path) -> None:
    published = plain(tmp_path, 5, act_fn=act_fn)
    weights = load_file(published.weights)
    weights["W_D"][3] = 0
    save_file(weights, published.weights)
    dictionary = load(tmp_path).dictionary
    assert bool(torch.isfinite(dictionary.reconstruct(torch.randn(50, 20))).all())
    assert not dictionary.encode(torch.randn(50, 20))[:, 3].any()


def test_a_threshold_may_have_the_name_of_either_spelling(tmp_path: Path) -> None:
    published = linear(tmp_path, 6)
    weights = load_file(published.weights)
    weights["activation_function.log_jumprelu_threshold"] = weights.pop("log_jumprelu_threshold")
    save_file(weights, published.weights)
    x = torch.randn(50, 20)
    torch.testing.assert_close(
        load(tmp_path).dictionary.encode(x).double(), published.encode(x.double()), rtol=2e-5, atol=2e-5
    )


def test_norms_that_were_folded_in_already_make_no_difference(tmp_path: Path) -> None:
    published = plain(tmp_path, 7, norm_activation="inference")
    exact = load(tmp_path).dictionary
    name = "dataset_average_activation_norm.blocks.3.hook_resid_post"
    save_file(load_file(published.weights) | {name: torch.tensor(7.0)}, published.weights)
    assert torch.equal(load(tmp_path).dictionary.W_enc, exact.W_enc)


def test_a_scale_that_the_file_lacks_is_given(tmp_path: Path) -> None:
    published = plain(tmp_path, 8)
    weights = load_file(published.weights)
    del weights["dataset_average_activation_norm.blocks.3.hook_resid_post"]
    save_file(weights, published.weights)
    with pytest.raises(ValueError, match=r"has no dataset_average_activation_norm\.blocks\.3.*give scale = sqrt"):
        load(tmp_path)
    found, x = load(tmp_path, scale=20**0.5 / 5.8125), torch.randn(50, 20)
    torch.testing.assert_close(found.dictionary.encode(x).double(), published.encode(x.double()), rtol=2e-5, atol=2e-5)
    assert said(found, "activation scale") == ("0.7694", "the user")


def test_a_scale_must_agree_with_the_file(tmp_path: Path) -> None:
    linear(tmp_path, 9)
    exact = load(tmp_path).dictionary
    assert torch.equal(load(tmp_path, scale=0.77).dictionary.W_enc, exact.W_enc)
    with pytest.raises(ValueError, match=r"scale is 2, but sae_weights.safetensors: dataset_average.* says 0.76"):
        load(tmp_path, scale=2.0)


def edit(path: Path, **change: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))


@pytest.mark.parametrize("sae_type", ["crosscoder", "lorsa", "molt", "clt", "mixcoder"])
def test_refuses_other_kinds_by_name(sae_type: str, tmp_path: Path) -> None:
    plain(tmp_path, 10)
    edit(tmp_path, sae_type=sae_type, n_experts=4)
    with pytest.raises(ValueError, match=f"sae_type '{sae_type}' is not supported; supported are sae, transcoder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"act_fn": "batchtopk"}, "act_fn 'batchtopk' is not supported; supported are jumprelu, relu, topk"),
        ({"use_glu_encoder": True}, "use_glu_encoder: gated linear encoders"),
        ({"norm_activation": "batch-wise"}, "norm_activation 'batch-wise' is not supported"),
        ({"sparsity_include_decoder_norm": "false"}, "must be true or false, got 'false'"),
        ({"expansion_factor": 2.0}, r"d_model \* expansion_factor is 40, but the weights have 48"),
        ({"d_model": 21}, "d_model is 21, but the weights have 20"),
        ({"use_decoder_bias": False}, "unexpected 'b_D'"),
        ({"act_fn": "relu"}, "unexpected 'activation_function.log_jumprelu_threshold'"),
        ({"act_fn": "topk", "top_k": 2.5}, "top_k must be a whole number above 0"),
        ({"hook_point_out": "somewhere"}, "hook_point_out 'somewhere' is not a place"),
        ({"hook_point_out": "blocks.3.hook_mlp_out"}, "no dataset_average_activation_norm.blocks.3.hook_mlp_out"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_refuses_what_it_does_not_understand(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    plain(tmp_path, 11)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=says):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "choices", "says"),
    [
        ({"apply_decoder_bias_to_pre_encoder": True}, {}, "which SAELens leaves out; choose gating openmoss"),
        ({"hook_point_out": "blocks.3.hook_mlp_out"}, {"gating": "saelens"}, "SAELens does not read these"),
        (
            {"hook_point_out": "blocks.3.hook_mlp_out", "apply_decoder_bias_to_pre_encoder": True},
            {},
            "not supported for a transcoder",
        ),
        (
            {"hook_point_out": "blocks.3.hook_mlp_out", "norm_activation": "token-wise"},
            {},
            "what a transcoder writes would have no known scale",
        ),
    ],
)
def test_refuses_of_the_older_spelling(
    change: dict[str, Any], choices: dict[str, Any], says: str, tmp_path: Path
) -> None:
    linear(tmp_path, 12)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=says):
        load(tmp_path, **choices)


@pytest.mark.parametrize("norm", [0.0, float("nan"), float("inf")])
def test_refuses_a_norm_that_nobody_measured(norm: float, tmp_path: Path) -> None:
    published = plain(tmp_path, 13)
    name = "dataset_average_activation_norm.blocks.3.hook_resid_post"
    save_file(load_file(published.weights) | {name: torch.tensor(norm)}, published.weights)
    with pytest.raises(ValueError, match="must be a number above 0"):
        load(tmp_path)


@pytest.mark.parametrize("build", [linear, plain, partial(plain, act_fn="topk")])
def test_centring_takes_the_scaled_bias_off(build: Any, tmp_path: Path) -> None:
    published = build(tmp_path, 14)
    edit(tmp_path, apply_decoder_bias_to_pre_encoder=True)
    choices = {"gating": "openmoss"} if build is linear else {}
    x, s = torch.randn(50, 20), 20**0.5 / 5.8125
    bias = load_file(published.weights)["decoder.bias" if build is linear else "b_D"].double()
    wanted = published.encode(x.double() - bias / s)
    torch.testing.assert_close(load(tmp_path, **choices).dictionary.encode(x).double(), wanted, rtol=2e-5, atol=2e-5)


def test_a_folder_of_saelens_is_not_taken(tmp_path: Path) -> None:
    plain(tmp_path, 15)
    assert openmoss.recognises(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    assert not openmoss.recognises(tmp_path)
