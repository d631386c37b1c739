"""circuit-tracer's cross-layer transcoders: all layers together are the reference's, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats import circuit_tracer_clt
from saeguard_sae.formats.parsed import ParsedSae, Source
from saeguard_sae.models import Site
from support.near import close
from support.published.circuit_tracer_clt import BUILDERS, LAYER, N_LAYERS

CASE = "circuit_tracer_clt_layer1"


def dictionary(found: ParsedSae) -> Dictionary:
    assert isinstance(found.dictionary, Dictionary)
    return found.dictionary


def said(found: ParsedSae) -> dict[str, tuple[str, str]]:
    return {one.name: (one.value, one.source) for one in found.conventions}


def test_one_layer_equals_the_reference(reference_saes: Path) -> None:
    found = circuit_tracer_clt.parse(Source(reference_saes / CASE / "W_enc_1.safetensors"))
    reference = np.load(reference_saes / CASE / "ref.npz")
    x = torch.from_numpy(reference["x"])
    close(dictionary(found).encode(x), reference["feature_acts"])
    close(dictionary(found).reconstruct(x).unflatten(-1, (2, 64)).sum(dim=-2), reference["recon"])
    assert (found.reads, found.writes) == (Site(1, "resid_mid"), (Site(1, "mlp_out"), Site(2, "mlp_out")))
    assert (dictionary(found).centre, found.model) == (False, "google/gemma-2-2b")


def test_all_layers_together_equal_the_reference(reference_saes: Path) -> None:
    reference = np.load(reference_saes / CASE / "ref.npz")
    xs = torch.from_numpy(reference["clt_x"])
    outs = {Site(layer, "mlp_out"): torch.zeros(9, 64) for layer in range(3)}
    for layer, x in enumerate(xs):
        found = circuit_tracer_clt.parse(Source(reference_saes / CASE / f"W_enc_{layer}.safetensors"))
        close(dictionary(found).encode(x), reference["clt_acts"][layer])
        blocks = dictionary(found).reconstruct(x).unflatten(-1, (len(found.writes), 64)).unbind(-2)
        for site, block in zip(found.writes, blocks, strict=True):
            assert isinstance(site, Site)
            outs[site] += block
    for layer in range(3):
        close(outs[Site(layer, "mlp_out")], reference["clt_out"][layer])


@pytest.mark.parametrize("name", BUILDERS)
def test_bias_and_skip_connection_go_to_its_own_layer(name: str, tmp_path: Path) -> None:
    published = BUILDERS[name](tmp_path, 1)
    assert published.reconstruct is not None
    found, x = circuit_tracer_clt.parse(Source(published.path)), torch.randn(9, published.d_in)
    assert len(found.writes) == N_LAYERS - LAYER
    torch.testing.assert_close(dictionary(found).encode(x), published.encode(x.double()).float())
    torch.testing.assert_close(
        dictionary(found).reconstruct(x), published.reconstruct(x.double()).float(), rtol=1e-5, atol=1e-5
    )
    assert said(found)["skip connection"][0] == ("yes" if "skip" in name else "no")
    assert said(found)["activation"] == (("jumprelu", "threshold_1") if "jump" in name else ("relu", "no threshold_1"))


def test_a_folder_of_several_layers_is_not_one_of_them(tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_clt_relu"](tmp_path, 2)
    assert circuit_tracer_clt.recognises(published.path)
    assert circuit_tracer_clt.recognises(tmp_path / "W_dec_2.safetensors")
    assert not circuit_tracer_clt.recognises(tmp_path)
    assert not circuit_tracer_clt.recognises(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="or several; name one of them"):
        circuit_tracer_clt.parse(Source(tmp_path))
    by_decoder = circuit_tracer_clt.parse(Source(tmp_path / "W_dec_2.safetensors"))
    assert by_decoder.writes == (Site(2, "mlp_out"), Site(3, "mlp_out"))
    assert [file.name for file in by_decoder.files] == ["W_enc_2.safetensors", "W_dec_2.safetensors", "config.yaml"]


@pytest.mark.parametrize("name", ["W_enc_1.safetensors", "W_dec_1.safetensors", "config.yaml"])
def test_each_of_its_files_is_needed(name: str, tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_clt_jumprelu_skip"](tmp_path, 3)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        circuit_tracer_clt.parse(Source(published.path))


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ({"model_kind": "transcoder_set"}, "model_kind 'transcoder_set' is not supported"),
        ({"activation": "topk"}, "unknown key 'activation'"),
        ({"feature_input_hook": "hook_somewhere"}, "feature_input_hook 'hook_somewhere' is not a place"),
        ({"feature_output_hook": "hook_somewhere"}, "feature_output_hook 'hook_somewhere' is not a place"),
        ({"feature_output_hook": ""}, "feature_output_hook must be text"),
    ],
)
def test_refuses_settings_that_it_does_not_understand(by: dict[str, Any], says: str, tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_clt_relu"](tmp_path, 4)
    assert published.config is not None
    published.config.write_text(yaml.safe_dump(yaml.safe_load(published.config.read_text()) | by))
    with pytest.raises(ValueError, match=says):
        circuit_tracer_clt.parse(Source(published.path))


@pytest.mark.parametrize(
    ("file", "by", "says"),
    [
        ("enc", {"threshold_1": torch.full((48,), -0.1)}, "threshold_1 is below 0 for some features"),
        ("enc", {"threshold_0": torch.zeros(48)}, "W_enc_1.safetensors: unexpected 'threshold_0'"),
        ("enc", {"W_enc_1": torch.zeros(20, 48)}, r"W_enc_1 has shape \(20, 48\), expected \(48, 20\)"),
        ("enc", {"W_skip_1": torch.zeros(20, 3)}, r"W_skip_1 has shape \(20, 3\), expected \(20, 20\)"),
        ("enc", {"b_dec_1": torch.zeros(60)}, r"W_dec_1 has shape \(48, 3, 20\), expected \(48, 3, 60\)"),
        ("enc", {"b_enc_1": None}, "no b_enc_1"),
        ("dec", {"W_dec_1": torch.zeros(48, 20)}, r"W_dec_1 has shape \(48, 20\), expected \(48, 1, 20\)"),
        ("dec", {"b_dec_1": torch.zeros(20)}, "W_dec_1.safetensors: unexpected 'b_dec_1'"),
    ],
)
def test_refuses_weights_that_it_does_not_understand(file: str, by: dict[str, Any], says: str, tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_clt_jumprelu_skip"](tmp_path, 5)
    path = tmp_path / f"W_{file}_1.safetensors"
    tensors = load_file(path) | by
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(ValueError, match=says):
        circuit_tracer_clt.parse(Source(published.path))
