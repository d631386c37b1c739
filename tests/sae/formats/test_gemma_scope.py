"""Gemma Scope 1: the reference's numbers, what the repository decides, and everything that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeguard_sae.dictionary import Dictionary, JumpReLU
from saeguard_sae.formats import gemma_scope
from saeguard_sae.formats.parsed import ParsedSae, SaeOrigin, Source
from saeguard_sae.models import Site
from support.near import close
from support.published.gemma_scope import BUILDERS, EMBEDDING, LAYER, REPO

MLP_OUT = (Site(5, "mlp_out"),)
CASES: dict[str, tuple[str, str, Site, tuple[Site, ...]]] = {
    "gemmascope1_res": ("res", LAYER, Site(5, "resid_post"), ()),
    "gemmascope1_mlp_lowercase_keys": ("mlp", LAYER, Site(5, "mlp_out"), ()),
    "gemmascope1_att_hook_z": ("att", LAYER, Site(5, "attn_z"), ()),
    "gemmascope1_embedding": ("res", EMBEDDING, Site(0, "embed"), ()),
    "gemmascope1_transcoder": ("transcoders", LAYER, Site(5, "mlp_normalized"), MLP_OUT),
}


def dictionary(found: ParsedSae) -> Dictionary:
    assert isinstance(found.dictionary, Dictionary)
    return found.dictionary


def said(found: ParsedSae) -> dict[str, tuple[str, str]]:
    return {one.name: (one.value, one.source) for one in found.conventions}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, reference_saes: Path) -> None:
    kind, path, reads, writes = CASES[case]
    found = gemma_scope.parse(Source(reference_saes / case / path, SaeOrigin(REPO + kind, path)))
    reference = np.load(reference_saes / case / "ref.npz")
    x = torch.from_numpy(reference["x"]).reshape(18, 64)
    close(dictionary(found).encode(x), reference["feature_acts"])
    close(dictionary(found).reconstruct(x), reference["recon"])
    assert (found.reads, found.writes, found.model) == (reads, writes, "google/gemma-2-2b")
    assert dictionary(found).is_transcoder == bool(writes)
    assert ("activation scale" in said(found)) == (case == "gemmascope1_embedding")


def test_the_center_is_not_subtracted_and_said_so(tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_res"](tmp_path, 1)
    found = gemma_scope.parse(Source(published.path))
    assert not dictionary(found).centre
    assert said(found)["centring"] == ("no", "the format")


def test_a_feature_fires_above_its_threshold_and_not_at_it(tmp_path: Path) -> None:
    arrays = {"W_enc": [[1.0, 1.0]], "W_dec": [[1.0], [2.0]], "b_enc": [0.5, 0.5], "b_dec": [0.0], "threshold": [1, 1]}
    np.savez(tmp_path / "params.npz", **{name: np.asarray(value, np.float32) for name, value in arrays.items()})
    found = gemma_scope.parse(Source(tmp_path))
    assert isinstance(dictionary(found).activation, JumpReLU)
    features = dictionary(found).encode(torch.tensor([[0.5], [0.75]]))
    assert features.tolist() == [[0.0, 0.0], [1.25, 1.25]]


def test_without_an_origin_neither_site_nor_kind_is_known(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_5" / "width_16k"
    folder.mkdir(parents=True)
    published = BUILDERS["gemma_scope_transcoders"](folder, 2)
    found = gemma_scope.parse(Source(published.path))
    assert (found.reads, found.writes, found.model) == (None, (), None)
    assert "could as well be a transcoder" in said(found)["kind"][0]


@pytest.mark.parametrize("repo", ["someone/gemma-scope-2b-pt-res", "google/gemma-scope-2-1b-pt", "a/layer_3"])
def test_other_repositories_say_nothing(repo: str, tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_res"](tmp_path, 3)
    found = gemma_scope.parse(Source(published.path, SaeOrigin(repo, LAYER)))
    assert (found.reads, found.model) == (None, None)


@pytest.mark.parametrize(("kind", "path"), [("res", ""), ("res", "width_16k"), ("mlp", EMBEDDING)])
def test_a_path_that_names_no_sae_of_the_repository_is_refused(kind: str, path: str, tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_res"](tmp_path, 4)
    with pytest.raises(ValueError, match=f"google/gemma-scope-2b-pt-{kind}: the path '{path}' names no SAE"):
        gemma_scope.parse(Source(published.path, SaeOrigin(REPO + kind, path)))


def test_models_are_named_as_they_were_tuned(tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_res"](tmp_path, 5)
    found = gemma_scope.parse(Source(published.path, SaeOrigin("google/gemma-scope-9b-it-res", LAYER)))
    assert found.model == "google/gemma-2-9b-it"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scaling_factor": np.full(48, 2.0, np.float32)}, "params.npz: scaling_factor is not all ones"),
        ({"r_mag": np.zeros(48, np.float32)}, "params.npz: unexpected 'r_mag'"),
        ({"w_enc": np.zeros((20, 48), np.float32)}, "params.npz: unexpected 'W_enc'"),
        ({"W_enc": np.zeros((48, 20), np.float32)}, r"W_enc has shape \(48, 20\), expected \(20, 48\)"),
        ({"threshold": None}, "params.npz: no threshold"),
        ({"W_dec": None}, "params.npz: no W_dec"),
        ({"b_enc": np.zeros(48, np.int64)}, "b_enc is torch.int64, not a float"),
    ],
)
def test_refuses_arrays_that_it_does_not_understand(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_res"](tmp_path, 6)
    with np.load(published.weights) as archive:
        arrays = dict(archive) | change
    np.savez(published.weights, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=says):
        gemma_scope.parse(Source(published.path))


def test_a_scaling_factor_of_ones_changes_nothing(tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_res"](tmp_path, 7)
    plain = dictionary(gemma_scope.parse(Source(published.path)))
    with np.load(published.weights) as archive:
        arrays = dict(archive)
    np.savez(published.weights, **arrays, scaling_factor=np.ones(48, np.float32))
    assert torch.equal(dictionary(gemma_scope.parse(Source(published.path))).W_dec, plain.W_dec)


def test_recognises_names_and_the_arrays_of_a_file_of_another_name(tmp_path: Path) -> None:
    published = BUILDERS["gemma_scope_mlp_lower_case"](tmp_path, 8)
    assert gemma_scope.recognises(published.path)
    assert gemma_scope.recognises(published.weights)
    renamed = published.weights.rename(tmp_path / "layer_5.npz")
    assert gemma_scope.recognises(renamed)
    assert not gemma_scope.recognises(tmp_path)
    np.savez(renamed, W_enc=np.zeros(3))
    assert not gemma_scope.recognises(renamed)
    renamed.write_bytes(b"damaged")
    assert not gemma_scope.recognises(renamed)
    (tmp_path / "params.npz").write_bytes(b"damaged")
    assert gemma_scope.recognises(tmp_path)
    with pytest.raises(ValueError, match=r"params\.npz"):
        gemma_scope.parse(Source(tmp_path))
