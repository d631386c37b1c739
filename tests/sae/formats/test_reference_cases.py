"""Every case of the larger reference, through the loader as a user meets it: none is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saeguard_sae.formats import Choices, SaeOrigin, Source
from saeguard_sae.loading import detect_format, read_sae
from support.near import close

# Where the files of a case leave something open: what its note says.
CHOICES: dict[str, Choices] = {
    # SAELens computes these two as if no factor were needed.
    "sl_standard_expected_average_only_in_bdec0": Choices(scale=1.0),
    "sl_standard_expected_average_only_in_bdec1": Choices(scale=1.0),
    "sl_standard_expected_average_folded": Choices(scale=0.37),
    "qwen_scope_pt": Choices(k=50),
}
ORIGINS = {
    "gemmascope1_embedding": SaeOrigin("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"),
    "gemmascope1_transcoder": SaeOrigin("google/gemma-scope-2b-pt-transcoders", "layer_5/width_16k/average_l0_71"),
}
# Training checkpoints' own outputs depend on the batch; served by their threshold, they equal their exported sibling.
SIBLINGS = {
    f"sl_{name}_training_ckpt": f"sl_{name}_inference"
    for name in ("batchtopk_rescale0", "batchtopk_rescale1", "matryoshka_batchtopk_rescale1")
}
REFUSED = {"ext_bussmann_batchtopk": "no threshold"}
HALF = ("_bfloat16", "_float16")
# Cross-layer transcoders: one layer alone has no reconstruction. Two have tests of their own for what theirs means.
FEATURES_ONLY = ("circuit_tracer_clt_layer1", "gemmascope2_clt_layer")
ELSEWHERE = ("e2e_interventions", "gemmascope2_clt_layer")


def cases(folder: Path) -> list[str]:
    found = [
        one["name"]
        for file in ("index.json", "index_ext.json")
        for one in json.loads((folder / file).read_text())["cases"]
    ]
    assert len(found) > 95
    return found


def path_of(folder: Path) -> Path:
    """The folder or file of a case that is an SAE."""
    if (clt := folder / "W_enc_1.safetensors").exists():
        return clt
    every = [folder, *sorted(folder.rglob("*"))]
    return next(one for one in every if detect_format(one))


def test_every_case(reference_saes: Path) -> None:
    failed: dict[str, str] = {}
    compared = 0
    for name in cases(reference_saes):
        if name in ELSEWHERE:
            continue
        try:
            compare(reference_saes, name)
            compared += 1
        except (AssertionError, ValueError, StopIteration) as err:
            failed[name] = repr(err)[:200]
    assert not failed, json.dumps(failed, indent=1)
    assert compared > 95


def compare(root: Path, name: str) -> None:
    source = Source(path_of(root / name), ORIGINS.get(name), CHOICES.get(name, Choices()))
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            read_sae(source)
        return
    coder = read_sae(source)[1].dictionary
    reference = np.load(root / SIBLINGS.get(name, name) / "ref.npz")
    x = torch.from_numpy(reference["x"])
    x = x.flatten(2) if x.ndim == 4 else x
    if name.endswith(HALF):
        coder = coder.to("cpu", getattr(torch, name.rpartition("_")[2]))
    features = coder.encode(x)
    if name.endswith(HALF):
        assert np.array_equal(features.float().numpy(), reference["feature_acts"])
        return
    close(features, reference["feature_acts"])
    if name in FEATURES_ONLY:
        return
    if "recon" in reference:
        close(coder.decode(features, x), reference["recon"])
    if "forward" in reference:
        close(coder.reconstruct(x), reference["forward"])


def test_a_dashboards_values_are_raw_values_times_the_decoder_rows_norm(reference_saes: Path) -> None:
    """SAELens' fold_W_dec_norm, which Neuronpedia's dashboards are made with, against the unit ``unit_decoder``."""
    compared = 0
    for name in cases(reference_saes):
        reference = np.load(reference_saes / name / "ref.npz")
        if "feature_acts_folded" not in reference or name in ELSEWHERE:
            continue
        coder = read_sae(Source(path_of(reference_saes / name), choices=CHOICES.get(name, Choices())))[1].dictionary
        x = torch.from_numpy(reference["x"])
        features = coder.encode(x.flatten(2) if x.ndim == 4 else x)
        close(features * coder.W_dec.norm(dim=1), reference["feature_acts_folded"])
        compared += 1
    assert compared > 20
