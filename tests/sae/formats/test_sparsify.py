"""sparsify: what the library computed from the same files, what the folder's name says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats import sparsify
from saeguard_sae.formats.parsed import ModulePlace, ParsedSae, Place, SaeOrigin, Source
from saeguard_sae.models import Site
from support.near import close
from support.published.sparsify import BUILDERS, NOW, build, old_skip_transcoder, topk

CASES = ("topk", "topk_no_normalize_decoder", "groupmax", "transcoder", "skip_transcoder")


def load(path: Path, origin: SaeOrigin | None = None) -> ParsedSae:
    return sparsify.parse(Source(path, origin))


def said(found: ParsedSae, name: str) -> str:
    return next(one.value for one in found.conventions if one.name == name)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_library(case: str, reference_saes: Path) -> None:
    folder = reference_saes / f"sparsify_{case}"
    found, reference = load(folder / "layers.3"), np.load(folder / "ref.npz")
    x = torch.from_numpy(reference["x"])
    features = found.dictionary.encode(x)
    close(features, reference["feature_acts"])
    close(found.dictionary.decode(features, x), reference["recon"])
    close(found.dictionary.reconstruct(x), reference["forward"])


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_the_plain_formulas(name: str, tmp_path: Path) -> None:
    published = BUILDERS[name](tmp_path, 71)
    dictionary, x = load(published.path).dictionary, torch.randn(60, published.d_in, dtype=torch.float64)
    assert published.reconstruct is not None
    torch.testing.assert_close(dictionary.encode(x.float()).double(), published.encode(x), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        dictionary.reconstruct(x.float()).double(), published.reconstruct(x), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize(
    ("hookpoint", "transcode", "reads", "writes"),
    [
        ("layers.10", False, Site(10, "resid_post"), ()),
        ("h.5", False, Site(5, "resid_post"), ()),
        ("layers.5.mlp", False, ModulePlace(5, "mlp", "out"), ()),
        ("layers.5.mlp", True, ModulePlace(5, "mlp", "in"), (ModulePlace(5, "mlp", "out"),)),
        ("layers.5", True, Site(5, "resid_pre"), (Site(5, "resid_post"),)),
        ("layers.0.attention", False, ModulePlace(0, "attention", "out"), ()),
        ("layers.7/seed3", False, Site(7, "resid_post"), ()),
        ("embed_tokens", False, Site(0, "embed"), ()),
        ("embed_tokens", True, None, ()),
        ("my_sae", False, None, ()),
    ],
)
def test_the_folders_name_is_the_hookpoint(
    hookpoint: str, transcode: bool, reads: Place | None, writes: tuple[Place, ...], tmp_path: Path
) -> None:
    published = build(tmp_path, 72, NOW | {"transcode": transcode}, hookpoint)
    found = load(published.path)
    assert (found.reads, found.writes) == (reads, writes)
    assert isinstance(found.dictionary, Dictionary)
    assert found.dictionary.is_transcoder == transcode


def test_the_folder_as_it_was_published_counts(tmp_path: Path) -> None:
    published = build(tmp_path, 73, NOW, "renamed")
    assert load(published.path, SaeOrigin("EleutherAI/sae-llama-3-8b-32x", "layers.10")).reads == Site(10, "resid_post")


def test_an_old_transcoder_is_known_by_its_skip_connection(tmp_path: Path) -> None:
    found = load(old_skip_transcoder(tmp_path, 74).path)
    assert said(found, "kind") == "transcoder of before 2025-02-12"
    assert said(found, "centring") == "yes"
    assert (found.reads, found.writes) == (ModulePlace(5, "mlp", "in"), (ModulePlace(5, "mlp", "out"),))


def test_an_old_sae_says_that_a_transcoder_would_look_the_same(tmp_path: Path) -> None:
    old = {key: value for key, value in NOW.items() if key not in ("transcode", "activation")}
    found = load(build(tmp_path, 75, old, "layers.5.mlp").path)
    assert "a transcoder's files look the same" in said(found, "kind")
    assert (found.reads, found.writes) == (ModulePlace(5, "mlp", "out"), ())


def test_the_number_of_features_may_be_a_multiple_of_the_width(tmp_path: Path) -> None:
    published = build(tmp_path, 76, {"k": 6, "d_in": 20, "expansion_factor": 2, "num_latents": 0}, "layers.3")
    with pytest.raises(ValueError, match="expansion_factor 2 is 40 features, the weights have 48"):
        load(published.path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": "relu"}, "activation 'relu' is not supported; supported are topk, groupmax"),
        ({"k": 0}, "k must be a whole number above 0"),
        ({"k": None}, "k must be a number"),
        ({"k": 60}, "k must be 1 to d_sae"),
        ({"activation": "groupmax", "k": 5}, "must divide d_sae"),
        ({"activation": "groupmax", "signed": True}, "signed goes with activation topk alone"),
        ({"transcode": "false"}, "transcode must be true or false, got 'false'"),
        ({"signed": 1}, "signed must be true or false, got 1"),
        ({"skip_connection": True}, "no W_skip"),
        ({"d_in": 21}, "d_in is 21, but the weights have 20"),
        ({"d_in": None}, "d_in must be a number"),
        ({"num_latents": 40}, "num_latents is 40, but the weights have 48"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_refuses_what_it_does_not_understand(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    published = topk(tmp_path, 77)
    (published.path / "cfg.json").write_text(json.dumps(NOW | change))
    with pytest.raises(ValueError, match=says):
        load(published.path)
