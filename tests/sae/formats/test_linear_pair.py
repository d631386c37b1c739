"""Goodfire's and qresearch's SAEs: what SAELens computed from the same files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeguard_sae.formats import linear_pair
from saeguard_sae.formats.parsed import ParsedSae, SaeOrigin, Source
from saeguard_sae.models import Site
from support.near import close
from support.published.linear_pair import BUILDERS, goodfire, qresearch

GOODFIRE = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19"


def load(file: Path, repo: str | None = None) -> ParsedSae:
    return linear_pair.parse(Source(file, SaeOrigin(repo) if repo else None))


@pytest.mark.parametrize(
    ("case", "file"),
    [
        ("goodfire_pth", "Llama-3.1-8B-Instruct-SAE-l19.pth"),
        ("deepseek_r1_qresearch_pt", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"),
    ],
)
def test_equals_saelens(case: str, file: str, reference_saes: Path) -> None:
    found, reference = load(reference_saes / case / file), np.load(reference_saes / case / "ref.npz")
    features = found.dictionary.encode(torch.from_numpy(reference["x"]))
    close(features, reference["feature_acts"])
    close(found.dictionary.decode(features), reference["recon"])


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_the_plain_formulas(name: str, tmp_path: Path) -> None:
    published = BUILDERS[name](tmp_path, 101)
    dictionary, x = load(published.path).dictionary, torch.randn(60, published.d_in, dtype=torch.float64)
    torch.testing.assert_close(dictionary.encode(x.float()).double(), published.encode(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("repo", "site"),
    [
        (GOODFIRE, Site(19, "resid_post")),
        ("Goodfire/Llama-3.3-70B-Instruct-SAE-l50", Site(50, "resid_post")),
        ("someone/llama-l19-copy", None),
        (None, None),
    ],
)
def test_the_layer_is_in_the_repositorys_name(repo: str | None, site: Site | None, tmp_path: Path) -> None:
    assert load(goodfire(tmp_path, 102).path, repo).reads == site


def test_recognises_either_spelling_and_nothing_else(tmp_path: Path) -> None:
    assert linear_pair.recognises(goodfire(tmp_path, 103).path)
    other = qresearch(tmp_path, 103).path
    assert linear_pair.recognises(other)
    assert not linear_pair.recognises(tmp_path)
    del (held := torch.load(other))["decoder.bias"]
    torch.save(held, other)
    assert not linear_pair.recognises(other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"encoder_linear.weight": torch.ones(20, 48)},
            r"encoder_linear.weight has shape \(20, 48\), expected \(48, 20\)",
        ),
        ({"encoder_linear.bias": torch.ones(48, dtype=torch.int8)}, "encoder_linear.bias is torch.int8, not a float"),
        ({"scale": torch.ones(1)}, "unexpected 'scale'"),
    ],
)
def test_refuses_what_it_does_not_understand(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = goodfire(tmp_path, 104).path
    torch.save(torch.load(file) | change, file)
    with pytest.raises(ValueError, match=says):
        load(file)
