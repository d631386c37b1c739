"""One spelling for a place in the model."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard_sae.models import POINTS, Site

sites = st.builds(
    lambda point, layer: Site(0 if point == "embed" else layer, point), st.sampled_from(POINTS), st.integers(0, 500)
)


@given(sites)
def test_prints_and_parses_the_same(site: Site) -> None:
    assert Site.parse(str(site)) == site


@given(st.text(max_size=30))
def test_only_its_own_spelling_parses(text: str) -> None:
    with suppress(ValueError):
        assert str(Site.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["blocks.12.hook_resid_post", "resid_post", "resid_post.", "resid_post.-1", "resid_post.01", 
             "resid_post.1 ", "resid_post.\u0661", "embed.1", "RESID_POST.1"],
)  # fmt: skip
def test_refuses_other_spellings(text: str) -> None:
    with pytest.raises(ValueError, match="is not a site"):
        Site.parse(text)
