"""What SAELens' training leaves beside the SAE, and what its versions before 6.0 wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saeguard_sae.models import Site
from support.saelens_settings import built, load, said

# Training checkpoints


def test_checkpoints_select_by_their_threshold(tmp_path: Path) -> None:
    found = load(built("checkpoint_batchtopk", tmp_path))
    assert said(found)["selection"] == ("above 0.55, not among a batch", "sae_weights.safetensors: topk_threshold")
    assert found.dictionary.architecture == "jumprelu"


@pytest.mark.parametrize(("version", "units"), [("6.13.1", "as stored"), ("6.14.0", "times"), (None, "times")])
def test_batch_topk_was_not_rescaled_before_saelens_6_14(version: str | None, units: str, tmp_path: Path) -> None:
    metadata = {"sae_lens_training_version": version}
    one = built("checkpoint_batchtopk", tmp_path, rescale_acts_by_decoder_norm=..., metadata=metadata)
    assert said(load(one))["feature units"][0].startswith(units)


def test_a_scaler_that_contradicts_the_settings_is_refused(tmp_path: Path) -> None:
    one = built("checkpoint_batchtopk", tmp_path, normalize_activations="none")
    with pytest.raises(ValueError, match=r"scaling_factor is 0\.37, but cfg\.json says normalize_activations 'none'"):
        load(one)
    one = built("checkpoint_whitened", tmp_path / "other", normalize_activations="layer_norm")
    with pytest.raises(ValueError, match="has_whitening is True"):
        load(one)


def test_a_whitening_needs_its_file(tmp_path: Path) -> None:
    one = built("checkpoint_whitened", tmp_path)
    assert [file.name for file in load(one).files][2:] == ["activation_scaler.json", "activation_whitening.safetensors"]
    matrices = load_file(tmp_path / "activation_whitening.safetensors")
    save_file(matrices | {"mean": matrices["mean"][:-1].clone()}, tmp_path / "activation_whitening.safetensors")
    with pytest.raises(ValueError, match="matrix has shape"):
        load(one)
    (tmp_path / "activation_whitening.safetensors").unlink()
    with pytest.raises(ValueError, match=r"covariance_whitening, but activation_whitening\.safetensors is not"):
        load(one)


# Versions before 6.0


def test_older_spellings(tmp_path: Path) -> None:
    found = load(built("legacy_finetuned", tmp_path))
    assert found.reads == Site(3, "resid_pre")
    assert said(found)["reads"] == ("resid_pre.3", "cfg.json: hook_point")
    assert said(found)["architecture"] == ("standard", "SAELens' default")
    assert said(found)["decoder scaled per feature"][0] == "yes"
    assert found.model == "gpt2-small"
    found = load(built("legacy_topk", tmp_path))
    assert said(found)["architecture"] == ("topk", "cfg.json: activation_fn_str")
    assert said(found)["k"] == ("6", "cfg.json: activation_fn_kwargs.k")
    found = load(built("legacy_tanh", tmp_path))
    assert (found.dictionary.architecture, found.reads) == ("tanh_relu", Site(3, "attn_z"))


def test_normalising_was_once_a_question(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give scale"):
        load(built("legacy_finetuned", tmp_path, normalize_activations=True))
    for nothing in (False, None, "none"):
        found = load(built("legacy_finetuned", tmp_path, normalize_activations=nothing))
        assert said(found)["normalisation"][0] == "none"


def test_a_scaling_factor_of_ones_says_nothing(tmp_path: Path) -> None:
    for name in ("legacy_topk", "standard"):
        one = built(name, tmp_path)
        weights = load_file(one.weights)
        plain = load(one).dictionary.tensors()["W_dec"].clone()
        save_file(weights | {"scaling_factor": torch.ones(48)}, one.weights)
        assert torch.equal(load(one).dictionary.tensors()["W_dec"], plain)
        save_file(weights | {"scaling_factor": torch.full((48,), 1.5)}, one.weights)
        with pytest.raises(ValueError, match=r"scaling_factor is not 1, but cfg\.json does not say"):
            load(one)


def test_a_scaling_factor_goes_by_two_names(tmp_path: Path) -> None:
    one = built("legacy_finetuned", tmp_path, finetuning_scaling_factor=True)
    weights, factors = load_file(one.weights), load(one).dictionary.tensors()["W_dec"].clone()
    save_file(weights | {"finetuning_scaling_factor": weights.pop("scaling_factor")}, one.weights)
    assert torch.equal(load(one).dictionary.tensors()["W_dec"], factors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hook_name": "blocks.4.hook_resid_pre"}, "hook_name is 'blocks.4.hook_resid_pre', but the same is"),
        ({"activation_fn_str": "gelu"}, "activation_fn 'gelu' is not supported"),
        ({"activation_fn_str": "tanh-relu", "architecture": "jumprelu"}, "not supported for architecture 'jumprelu'"),
        ({"activation_fn": "topk"}, "no k, the number of features"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 6, "alpha": 2}}, "activation_fn_kwargs: unknown key"),
        ({"hook_point_head_index": 2}, "hook_point_head_index: SAEs of a single attention head"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"metadata": "none"}, "metadata must be a table"),
        ({"finetuning_scaling_factor": "yes"}, "finetuning_scaling_factor must be true or false"),
    ],
)
def test_refuses_older_settings_by_name(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load(built("legacy_finetuned", tmp_path, **change))
