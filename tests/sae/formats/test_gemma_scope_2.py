"""Gemma Scope 2: the reference's numbers, one layer of a cross-layer transcoder, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats import gemma_scope_2
from saeguard_sae.formats.parsed import ModulePlace, ParsedSae, SaeOrigin, Source
from saeguard_sae.models import Site
from support.near import close
from support.published.gemma_scope_2 import BUILDERS, LAYER, N_LAYERS, NORM_IN, NORM_OUT, REPO

READS, WRITES = (
    ModulePlace(17, "pre_feedforward_layernorm", "out"),
    ModulePlace(17, "post_feedforward_layernorm", "out"),
)
CASES: dict[str, tuple[str, Any, tuple[Any, ...]]] = {
    "gemmascope2_resid_post": ("resid_post/layer_17_width_16k_l0_small", Site(17, "resid_post"), ()),
    "gemmascope2_attn_out": (
        "attn_out/layer_17_width_16k_l0_small",
        ModulePlace(17, "self_attn.o_proj", "in"),
        (),
    ),
    "gemmascope2_transcoder_affine": ("transcoder/layer_17_width_16k_l0_small_affine", READS, (WRITES,)),
}
CLT = "clt/layer_3_width_16k_l0_big.safetensors"


def dictionary(found: ParsedSae) -> Dictionary:
    assert isinstance(found.dictionary, Dictionary)
    return found.dictionary


def said(found: ParsedSae) -> dict[str, tuple[str, str]]:
    return {one.name: (one.value, one.source) for one in found.conventions}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, reference_saes: Path) -> None:
    path, reads, writes = CASES[case]
    found = gemma_scope_2.parse(Source(reference_saes / case / path, SaeOrigin(REPO, path)))
    reference = np.load(reference_saes / case / "ref.npz")
    x = torch.from_numpy(reference["x"])
    close(dictionary(found).encode(x), reference["feature_acts"])
    close(dictionary(found).decode(dictionary(found).encode(x)), reference["recon"])
    if "forward" in reference:
        close(dictionary(found).reconstruct(x), reference["forward"])
    assert (found.reads, found.writes) == (reads, writes)
    assert (dictionary(found).centre, dictionary(found).is_transcoder) == (False, bool(writes))
    assert found.model == "google/gemma-3-1b-pt"
    assert found.stated_l0 == (None if case == "gemmascope2_attn_out" else 20.0)


def test_every_target_of_the_reference_layer_adds_up(reference_saes: Path, tmp_path: Path) -> None:
    case = reference_saes / "gemmascope2_clt_layer"
    file = tmp_path / "params_layer_0.safetensors"  # its random vectors for all five layers are then allowed
    save_file(load_file(case / CLT), file)
    found, reference = gemma_scope_2.parse(Source(file)), np.load(case / "ref.npz")
    x = torch.from_numpy(reference["x"])
    close(dictionary(found).encode(x), reference["feature_acts"])
    close(dictionary(found).reconstruct(x).unflatten(-1, (5, 64)).sum(dim=-2), reference["recon"])
    assert len(found.writes) == 5


def test_a_later_layer_of_the_reference_writes_at_the_layers_that_are_left(
    reference_saes: Path, tmp_path: Path
) -> None:
    case = reference_saes / "gemmascope2_clt_layer"
    tensors = load_file(case / CLT)
    tensors["w_dec"][:, :3] = 0
    file = tmp_path / Path(CLT).name
    save_file(tensors, file)
    found, reference = gemma_scope_2.parse(Source(file)), np.load(case / "ref.npz")
    x, features = torch.from_numpy(reference["x"]), torch.from_numpy(reference["feature_acts"])
    close(dictionary(found).encode(x), reference["feature_acts"])
    own, later = dictionary(found).reconstruct(x).unflatten(-1, (2, 64)).unbind(-2)
    close(own, features @ tensors["w_dec"][:, 3] + tensors["b_dec"])
    close(later, features @ tensors["w_dec"][:, 4])
    assert found.reads == ModulePlace(3, "pre_feedforward_layernorm", "out")
    assert found.writes == tuple(ModulePlace(layer, "post_feedforward_layernorm", "out") for layer in (3, 4))
    assert said(found)["writes"][1] == "the format"


def test_vectors_for_layers_before_its_own_are_refused(reference_saes: Path) -> None:
    with pytest.raises(ValueError, match="its w_dec writes at layers before 3"):
        gemma_scope_2.parse(Source(reference_saes / "gemmascope2_clt_layer" / CLT))


def test_the_settings_of_all_layers_give_each_its_place(tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_2_clt"](tmp_path, 1)
    found = gemma_scope_2.parse(Source(published.path))
    assert found.reads == ModulePlace(LAYER, "pre_feedforward_layernorm", "out")
    assert found.writes == tuple(
        ModulePlace(layer, "post_feedforward_layernorm", "out") for layer in range(LAYER, N_LAYERS)
    )
    assert found.stated_l0 is None
    assert {file.name for file in found.files} == {"params_layer_2.safetensors", "config.json"}
    assert said(found)["layer"] == ("2", "params_layer_2.safetensors")


@pytest.mark.parametrize(
    ("path", "reads", "kind"),
    [
        ("resid_post_all/layer_3_width_16k_l0_small", Site(3, "resid_post"), "SAE"),
        ("mlp_out/layer_4_width_16k_l0_big", ModulePlace(4, "post_feedforward_layernorm", "out"), "SAE"),
        ("attn_out/layer_5_width_16k_l0_big", ModulePlace(5, "self_attn.o_proj", "in"), "SAE"),
        ("transcoder_all/layer_6_width_16k_l0_big", ModulePlace(6, "pre_feedforward_layernorm", "out"), "transcoder"),
    ],
)
def test_the_repository_says_what_config_json_would(path: str, reads: Any, kind: str, tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_2_attention_without_config"](tmp_path, 2)
    found = gemma_scope_2.parse(Source(published.path, SaeOrigin("google/gemma-scope-2-270m-pt", path)))
    assert (found.reads, found.model) == (reads, "google/gemma-3-270m")
    assert said(found)["kind"] == (kind, "the repository")


@pytest.mark.parametrize(
    "origin", [None, SaeOrigin("someone/else", "attn_out/layer_5_width_16k_l0_big"), SaeOrigin(REPO)]
)
def test_without_config_and_origin_the_site_is_unknown(origin: SaeOrigin | None, tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_2_attention_without_config"](tmp_path, 3)
    found = gemma_scope_2.parse(Source(published.path, origin))
    assert (found.reads, found.writes, found.model) == (None, (), None)
    assert "nothing says" in said(found)["kind"][1]


def test_the_repository_can_name_the_layer(tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_2_clt"](tmp_path, 4)
    file = published.weights.rename(tmp_path / "downloaded.safetensors")
    assert gemma_scope_2.recognises(file)
    with pytest.raises(ValueError, match=r"which layer is it\? nothing says; call the file params_layer_N"):
        gemma_scope_2.parse(Source(file))
    found = gemma_scope_2.parse(Source(file, SaeOrigin(REPO, "clt/width_262k_l0_big/params_layer_2.safetensors")))
    assert found.reads == ModulePlace(2, "pre_feedforward_layernorm", "out")
    with pytest.raises(ValueError, match="before 3"):
        gemma_scope_2.parse(Source(file, SaeOrigin(REPO, "clt/layer_3_width_16k_l0_big")))


def test_contradicting_layers_are_refused(tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_2_clt"](tmp_path, 5)
    with pytest.raises(ValueError, match=r"params_layer_2\.safetensors says 2; the repository's path says 1"):
        gemma_scope_2.parse(Source(published.path, SaeOrigin(REPO, "clt/width_16k/params_layer_1.safetensors")))
    change(published.config, {"hf_hook_point_in": f"model.layers.4.{NORM_IN}"})
    with pytest.raises(ValueError, match=r"says 2; config\.json: hf_hook_point_in says 4"):
        gemma_scope_2.parse(Source(published.path))
    far = published.weights.rename(tmp_path / "params_layer_7.safetensors")
    change(published.config, {"hf_hook_point_in": None})
    with pytest.raises(ValueError, match="holds layer 7, but its w_dec writes at 5 layers only"):
        gemma_scope_2.parse(Source(far))


def change(file: Path | None, by: dict[str, Any]) -> None:
    """Changes config.json; None takes a key away."""
    assert file is not None
    config = json.loads(file.read_text()) | by
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("builder", "by", "says"),
    [
        ("sae", {"type": "crosscoder"}, "config.json: type 'crosscoder' is not supported"),
        ("sae", {"type": "clt"}, "its w_dec has 2 dimensions"),
        ("clt", {"type": "transcoder"}, "its w_dec has 3 dimensions"),
        ("sae", {"architecture": "topk"}, "config.json: architecture 'topk' is not supported"),
        ("sae", {"width": 47}, "config.json: width is 47, but the weights have 48"),
        ("clt", {"width": 48}, "config.json: width is 48, but the weights have 240"),
        ("sae", {"surprise": 1}, "unknown key 'surprise'"),
        ("sae", {"affine_connection": True}, "affine_connection is True, but params.safetensors lacks"),
        ("affine", {"affine_connection": False}, "affine_connection is False, but params.safetensors holds"),
        ("affine", {"affine_connection": "false"}, "affine_connection must be true or false"),
        ("sae", {"hf_hook_point_out": "model.layers.18.output"}, "is not where this SAE reads"),
        ("affine", {"type": "sae"}, "affine_skip_connection in an SAE"),
        ("sae", {"hf_hook_point_in": "model.layers.{5,9}.output"}, "is not a place that is known"),
        ("sae", {"hf_hook_point_in": 5}, "hf_hook_point_in must be text"),
        ("transcoder", {"hf_hook_point_out": "elsewhere"}, "'elsewhere' is not a place that is known"),
        ("transcoder", {"hf_hook_point_out": None}, "hf_hook_point_out must be text"),
        ("clt", {"hf_hook_point_out": "elsewhere"}, "'elsewhere' is not a place that is known"),
    ],
)
def test_refuses_settings_that_it_does_not_understand(
    builder: str, by: dict[str, Any], says: str, tmp_path: Path
) -> None:
    published = BUILDERS[f"gemma_scope_2_{builder}"](tmp_path, 6)
    change(published.config, by)
    with pytest.raises(ValueError, match=says):
        gemma_scope_2.parse(Source(published.path))


@pytest.mark.parametrize(
    ("builder", "kind", "who"),
    [
        ("sae", "SAE", "nothing says"),
        ("transcoder", "transcoder", "hf_hook_point_in and hf_hook_point_out"),
        ("affine", "transcoder", "affine_skip_connection"),
        ("clt", "one layer of a cross-layer transcoder", "w_dec"),
    ],
)
def test_the_kind_follows_from_the_rest_where_it_is_not_stated(
    builder: str, kind: str, who: str, tmp_path: Path
) -> None:
    published = BUILDERS[f"gemma_scope_2_{builder}"](tmp_path, 7)
    change(published.config, {"type": None})
    found = gemma_scope_2.parse(Source(published.path))
    assert said(found)["kind"][0] == kind
    assert who in said(found)["kind"][1]


@pytest.mark.parametrize("l0", ["small", True, None, [20]])
def test_an_l0_that_is_no_number_is_left_out(l0: Any, tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_2_sae"](tmp_path, 8)
    change(published.config, {"l0": l0})
    assert gemma_scope_2.parse(Source(published.path)).stated_l0 is None


def test_the_layers_of_a_multimodal_model_are_the_same_layers(tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_2_transcoder"](tmp_path, 9)
    hooks = {"hf_hook_point_in": NORM_IN, "hf_hook_point_out": NORM_OUT}
    change(published.config, {key: f"model.language_model.layers.17.{hook}" for key, hook in hooks.items()})
    found = gemma_scope_2.parse(Source(published.path))
    assert (found.reads, found.writes) == (READS, (WRITES,))


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ({"w_enc": torch.zeros(48, 20)}, r"w_enc has shape \(48, 20\), expected \(48, 48\)"),
        ({"b_dec": torch.zeros(100)}, r"params.safetensors: b_dec has shape \(100,\), expected \(24,\)"),
        ({"affine_skip_connection": torch.zeros(24, 20)}, r"has shape \(24, 20\), expected \(20, 24\)"),
        ({"threshold": torch.zeros(1)}, r"threshold has shape \(1,\), expected \(48,\)"),
        ({"r_mag": torch.zeros(48)}, "unexpected 'r_mag'"),
        ({"threshold": None}, "no threshold"),
        ({"w_dec": torch.zeros(3)}, "its w_dec has 1 dimensions"),
    ],
)
def test_refuses_weights_that_it_does_not_understand(by: dict[str, Any], says: str, tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_2_affine"](tmp_path, 10)
    change(published.config, {"width": None})
    tensors = load_file(published.weights) | by
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, published.weights)
    with pytest.raises(ValueError, match=says):
        gemma_scope_2.parse(Source(published.path))


def test_a_part_of_a_crosscoder_is_not_taken_for_an_sae(tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_2_attention_without_config"](tmp_path, 11)
    part = published.weights.rename(tmp_path / "params_layer_0.safetensors")
    with pytest.raises(ValueError, match="parts of crosscoders are not supported"):
        gemma_scope_2.parse(Source(part))
    with pytest.raises(ValueError, match="the repository: type 'crosscoder' is not supported"):
        gemma_scope_2.parse(Source(part, SaeOrigin(REPO, "crosscoder/layer_5_9_12_15_width_1m_l0_big")))


def test_recognises_names_and_the_tensors_of_a_file_of_another_name(tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_2_clt"](tmp_path, 12)
    assert gemma_scope_2.recognises(published.weights)
    assert not gemma_scope_2.recognises(tmp_path)
    other = published.weights.rename(tmp_path / "layer_2_width_16k.safetensors")
    assert gemma_scope_2.recognises(other)
    other.write_bytes(b"damaged")
    assert not gemma_scope_2.recognises(other)
    damaged = other.rename(tmp_path / "params.safetensors")
    assert gemma_scope_2.recognises(tmp_path)
    with pytest.raises(ValueError, match=r"params\.safetensors"):
        gemma_scope_2.parse(Source(damaged))
