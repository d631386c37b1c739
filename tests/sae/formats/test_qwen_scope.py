"""Qwen-Scope: what SAELens computed from the same files, who says k, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeguard_sae.formats import qwen_scope
from saeguard_sae.formats.parsed import Choices, ParsedSae, SaeOrigin, Source
from saeguard_sae.models import Site
from support.near import close
from support.published.qwen_scope import BUILDERS, REPO, SETTINGS, alone, build, with_settings


def load(file: Path, origin: SaeOrigin | None = None, k: int | None = None) -> ParsedSae:
    return qwen_scope.parse(Source(file, origin, Choices(k=k)))


def who(found: ParsedSae) -> tuple[str, str]:
    return next((one.value, one.source) for one in found.conventions if one.name == "k")


def test_equals_saelens(reference_saes: Path) -> None:
    folder = reference_saes / "qwen_scope_pt"
    origin = SaeOrigin("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "layer3.sae.pt")
    found, reference = load(folder / "layer3.sae.pt", origin), np.load(folder / "ref.npz")
    features = found.dictionary.encode(torch.from_numpy(reference["x"]))
    close(features, reference["feature_acts"])
    close(found.dictionary.decode(features), reference["recon"])
    assert (found.reads, found.model) == (Site(3, "resid_post"), "Qwen3-1.7B-Base")


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_the_plain_formulas(name: str, tmp_path: Path) -> None:
    published = BUILDERS[name](tmp_path, 111)
    origin = SaeOrigin(published.repo, published.repo_path) if published.repo else None
    dictionary = load(published.path, origin, published.choices.get("k")).dictionary
    x = torch.randn(60, published.d_in, dtype=torch.float64)
    torch.testing.assert_close(dictionary.encode(x.float()).double(), published.encode(x), rtol=2e-5, atol=2e-5)


def test_k_is_the_repositorys_or_the_users(tmp_path: Path) -> None:
    file = alone(tmp_path, 112).path
    assert who(load(file, SaeOrigin(REPO, "layer3.sae.pt"), k=9)) == ("6", "the repository's name")
    assert load(file, SaeOrigin(REPO)).used == frozenset()
    assert (who(load(file, k=9)), load(file, k=9).used) == (("9", "the user"), {"k"})
    with_settings(tmp_path, 112)
    found = load(file)
    assert (who(found), found.used) == (("6", "config.json: k"), frozenset())
    assert (found.model, found.files) == ("Qwen/Qwen3-1.7B-Base", (file, tmp_path / "config.json"))


def test_asks_for_k_where_nobody_says_it(tmp_path: Path) -> None:
    file = alone(tmp_path, 113).path
    with pytest.raises(ValueError, match=r"layer3.sae.pt: how many features are kept is not in the file; give k"):
        load(file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "surprise": 1}))
    with pytest.raises(ValueError, match="give k"):
        load(file)


@pytest.mark.parametrize(
    ("name", "origin", "site"),
    [
        ("layer12.sae.pt", None, Site(12, "resid_post")),
        ("renamed.pt", None, None),
        ("renamed.pt", SaeOrigin(REPO, "layer7.sae.pt"), Site(7, "resid_post")),
    ],
)
def test_the_layer_is_in_the_files_name(name: str, origin: SaeOrigin | None, site: Site | None, tmp_path: Path) -> None:
    file = alone(tmp_path, 114).path.rename(tmp_path / name)
    assert load(file, origin, k=6).reads == site


def test_recognises_one_row_of_the_encoder_for_each_feature(tmp_path: Path) -> None:
    file = build(tmp_path, 115).path
    assert qwen_scope.recognises(file)
    held = torch.load(file)
    torch.save(held | {"W_enc": held["W_enc"].T, "W_dec": held["W_dec"].T}, file)
    assert not qwen_scope.recognises(file)
    square = {"W_enc": torch.ones(4, 4), "W_dec": torch.ones(4, 4), "b_enc": torch.ones(4), "b_dec": torch.ones(4)}
    torch.save(square, file)
    assert qwen_scope.recognises(file)
    (tmp_path / "layer3.sae_cfg.json").write_text("{}")
    assert not qwen_scope.recognises(file)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 7}, "k is 7, but the repository's name says 6"),
        ({"k": "6"}, "k must be a number"),
        ({"hook_point": "mlp_out"}, "hook_point 'mlp_out' is not supported"),
        ({"d_model": 21}, "d_model is 21, but the weights have 20"),
        ({"d_sae": 40}, "d_sae is 40, but the weights have 48"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_refuses_settings_that_contradict(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = build(tmp_path, 116).path
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | change))
    with pytest.raises(ValueError, match=says):
        load(file, SaeOrigin(REPO, "layer3.sae.pt"))
