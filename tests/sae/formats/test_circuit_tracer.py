"""circuit-tracer's single-layer transcoders: the reference's numbers, where each thing is said, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeguard_sae.dictionary import Dictionary, TopK
from saeguard_sae.formats import circuit_tracer
from saeguard_sae.formats.parsed import Choices, ModulePlace, ParsedSae, Source
from saeguard_sae.models import Site
from support.near import close
from support.published.circuit_tracer import BUILDERS, K

CASES: dict[str, tuple[str, Any, tuple[Any, ...]]] = {
    "circuit_tracer_transcoder": ("relu_transcoder", Site(1, "mlp_in"), (Site(1, "mlp_out"),)),
    "ext_circuit_tracer_jumprelu_skip": ("jumprelu_skip_transcoder", None, ()),
    "ext_circuit_tracer_topk_gate": ("topk_transcoder", Site(0, "mlp_in"), (ModulePlace(0, "mlp", "out"),)),
}


def dictionary(found: ParsedSae) -> Dictionary:
    assert isinstance(found.dictionary, Dictionary)
    return found.dictionary


def said(found: ParsedSae) -> dict[str, tuple[str, str]]:
    return {one.name: (one.value, one.source) for one in found.conventions}


def change(file: Path | None, by: dict[str, Any]) -> None:
    """Changes config.yaml; None takes a key away."""
    assert file is not None
    config = yaml.safe_load(file.read_text()) | by
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))


def change_weights(file: Path, by: dict[str, Tensor | None]) -> None:
    tensors: dict[str, Tensor | None] = load_file(file) | by
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, reference_saes: Path) -> None:
    architecture, reads, writes = CASES[case]
    found, reference = (
        circuit_tracer.parse(Source(reference_saes / case)),
        np.load(reference_saes / case / "ref.npz"),
    )
    x = torch.from_numpy(reference["x"])
    close(dictionary(found).encode(x), reference["feature_acts"])
    close(dictionary(found).reconstruct(x), reference["forward" if "forward" in reference else "recon"])
    assert (found.reads, found.writes) == (reads, writes)
    assert (dictionary(found).architecture, dictionary(found).centre) == (architecture, False)


def test_topk_of_the_reference_keeps_negative_values(reference_saes: Path) -> None:
    reference = np.load(reference_saes / "ext_circuit_tracer_topk_gate" / "ref.npz")
    assert reference["feature_acts"].min() < 0
    found = circuit_tracer.parse(Source(reference_saes / "ext_circuit_tracer_topk_gate"))
    assert dictionary(found).activation == TopK(48, keeps_negative=True)
    assert said(found)["activation"] == ("topk, k = 48; negative values stay", "config.yaml: k")


def test_files_from_before_august_2025_are_turned(tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_turned"](tmp_path, 1)
    found, x = circuit_tracer.parse(Source(published.path)), torch.randn(9, published.d_in)
    assert published.reconstruct is not None
    torch.testing.assert_close(
        dictionary(found).reconstruct(x), published.reconstruct(x.double()).float(), rtol=1e-5, atol=1e-5
    )
    assert dictionary(found).W_dec.is_contiguous()
    assert said(found)["W_dec"] == ("[d_out, d_sae]", "its shape")


def test_a_square_decoder_is_read_feature_by_feature(tmp_path: Path) -> None:
    tensors = {name: torch.randn(6, 6) for name in ("W_enc", "W_dec")} | {
        name: torch.randn(6) for name in ("b_enc", "b_dec")
    }
    save_file(tensors, tmp_path / "layer_0.safetensors")
    found = circuit_tracer.parse(Source(tmp_path))
    assert torch.equal(dictionary(found).W_dec, tensors["W_dec"])
    assert said(found)["W_dec"] == ("[d_sae, d_out]", "the format")


def test_the_layer_is_the_file_s_and_the_set_s_settings_are_beside_it(tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_relu"](tmp_path, 2)
    save_file(load_file(published.weights), tmp_path / "layer_11.safetensors")
    (tmp_path / "wandb-config.yaml").write_text("anything: {}\n")
    assert not circuit_tracer.recognises(tmp_path)
    with pytest.raises(ValueError, match=r"no layer_N\.safetensors, or several"):
        circuit_tracer.parse(Source(tmp_path))
    found = circuit_tracer.parse(Source(tmp_path / "layer_11.safetensors"))
    assert (found.reads, found.writes) == (Site(11, "mlp_in"), (Site(11, "mlp_out"),))
    assert found.model == "Qwen/Qwen3-4B"
    assert {file.name for file in found.files} == {"layer_11.safetensors", "config.yaml"}


def test_an_input_hook_that_is_no_site_leaves_the_site_to_the_user(tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_relu"](tmp_path, 3)
    change(published.config, {"feature_input_hook": "attn.hook_q"})
    found = circuit_tracer.parse(Source(published.path))
    assert (found.reads, found.writes) == (None, (Site(3, "mlp_out"),))


def test_k_comes_from_the_settings_the_weights_or_the_user(tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_topk"](tmp_path, 4)
    change(published.config, {"k": None})
    with pytest.raises(ValueError, match="activation is topk, but k is not in the files; give k"):
        circuit_tracer.parse(Source(published.path))
    given = circuit_tracer.parse(Source(published.path, choices=Choices(k=7)))
    assert (dictionary(given).activation, given.used) == (TopK(7, keeps_negative=True), {"k"})
    change_weights(published.weights, {"k": torch.tensor(K)})
    found = circuit_tracer.parse(Source(published.path, choices=Choices(k=7)))
    assert (dictionary(found).activation, found.used) == (TopK(K, keeps_negative=True), frozenset())
    change(published.config, {"k": 9})
    with pytest.raises(ValueError, match=r"layer_3\.safetensors: k and config\.yaml: k differ: 15 and 9"):
        circuit_tracer.parse(Source(published.path))


def test_k_is_a_choice_where_no_settings_are_there(tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_relu"](tmp_path, 5)
    assert published.config is not None
    with_settings = circuit_tracer.parse(Source(published.path, choices=Choices(k=7)))
    assert (dictionary(with_settings).activation.name, with_settings.used) == ("relu", frozenset())
    published.config.unlink()
    alone = circuit_tracer.parse(Source(published.path, choices=Choices(k=7)))
    assert (dictionary(alone).activation, alone.used) == (TopK(7, keeps_negative=True), {"k"})
    assert dictionary(circuit_tracer.parse(Source(published.path))).activation.name == "relu"


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ({"model_kind": "cross_layer_transcoder"}, "model_kind 'cross_layer_transcoder' is not supported"),
        ({"model_kind": None}, "model_kind None is not supported"),
        ({"activation": "gelu"}, "activation 'gelu' is not supported"),
        ({"activation": "jump_relu"}, "no activation_function.threshold"),
        ({"activation": "topk", "k": 0}, "k must be a whole number above 0"),
        ({"activation": "topk", "k": 49}, "k must be 1 to d_sae"),
        ({"feature_output_hook": "hook_somewhere"}, "'blocks.3.hook_somewhere' is not a place that is known"),
        ({"feature_output_hook": None}, "feature_output_hook must be text"),
        ({"feature_input_hook": 3}, "feature_input_hook must be text"),
        ({"surprise": 1}, "config.yaml: unknown key 'surprise'"),
        ({3: 4}, "config.yaml: unknown key '3'"),
    ],
)
def test_refuses_settings_that_it_does_not_understand(by: dict[str, Any], says: str, tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_relu"](tmp_path, 6)
    change(published.config, by)
    with pytest.raises(ValueError, match=says):
        circuit_tracer.parse(Source(published.path))


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ({"activation_function.threshold": torch.zeros(48)}, r"unexpected 'activation_function.threshold'"),
        ({"k": torch.tensor(3)}, "unexpected 'k'"),
        ({"W_enc": torch.zeros(20, 48)}, r"W_enc has shape \(20, 48\), expected \(48, 48\)"),
        ({"W_dec": torch.zeros(48, 21)}, r"W_dec has shape \(48, 21\), expected \(48, 20\)"),
        ({"W_skip": torch.zeros(20, 19)}, r"W_skip has shape \(20, 19\), expected \(20, 20\)"),
        ({"W_dec": None}, "no W_dec"),
    ],
)
def test_refuses_weights_that_it_does_not_understand(by: dict[str, Any], says: str, tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_relu"](tmp_path, 7)
    change_weights(published.weights, by)
    with pytest.raises(ValueError, match=says):
        circuit_tracer.parse(Source(published.path))


def test_thresholds_below_zero_would_let_negative_values_through(tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_jumprelu_skip"](tmp_path, 8)
    threshold = load_file(published.weights)["activation_function.threshold"]
    threshold[5] = -0.1
    change_weights(published.weights, {"activation_function.threshold": threshold})
    with pytest.raises(ValueError, match="is below 0 for some features"):
        circuit_tracer.parse(Source(published.path))


def test_recognises_by_name_alone(tmp_path: Path) -> None:
    published = BUILDERS["circuit_tracer_relu"](tmp_path, 9)
    published.weights.write_bytes(b"damaged")
    assert circuit_tracer.recognises(tmp_path)
    assert circuit_tracer.recognises(published.weights)
    with pytest.raises(ValueError, match=r"layer_3\.safetensors"):
        circuit_tracer.parse(Source(tmp_path))
    assert not circuit_tracer.recognises(published.weights.rename(tmp_path / "layer_3_width_16k.safetensors"))
    assert not circuit_tracer.recognises(tmp_path)
    assert not circuit_tracer.recognises(tmp_path / "layer_4.safetensors")
