"""The catalogue: order, words, pages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard.catalog import Feature, FeaturePage
from saeguard_server import catalog as flow
from saeguard_server.catalog import Catalog
from saeguard_server.errors import Cancelled, InvalidRequest, UnknownName
from saeguard_server.threads import Cancellation


@pytest.fixture
def catalog(saes: Any) -> Catalog:
    return Catalog(saes)


def found(page: FeaturePage) -> list[tuple[str, int]]:
    return [(one.sae, one.index) for one in page.features]


def test_labelled_features_come_first_then_the_densest(catalog: Catalog) -> None:
    assert found(catalog.features("", "", 0, "")) == [("late", 0), ("mid", 5), ("mid", 2), ("mid", 1)]
    assert found(catalog.features("mid", "", 0, "")) == [("mid", 5), ("mid", 2), ("mid", 1)]


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("FRENCH", [("late", 0), ("mid", 2)]),
        ("french text", [("mid", 2)]),
        ("OÙ Chat", [("mid", 2)]),
        ("  ", [("late", 0), ("mid", 5), ("mid", 2), ("mid", 1)]),
        ("nothing", []),
    ],
)
def test_every_word_must_be_somewhere(catalog: Catalog, query: str, wanted: list[tuple[str, int]]) -> None:
    assert found(catalog.features("", query, 0, "")) == wanted


@pytest.mark.parametrize("query", ["x" * 1025, "a " * 33])
def test_a_long_query_is_refused(catalog: Catalog, query: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalog.features("", query, 0, "")
    assert caught.value.field == "query"


def test_a_search_ends_when_nobody_waits_for_it(catalog: Catalog) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        catalog.features("", "nothing", 0, "", cancellation)


def test_pages_put_together_are_the_whole(catalog: Catalog) -> None:
    whole = found(catalog.features("", "", 0, ""))
    for size in (1, 2, 3, 4, 1000):
        token, parts = "", []
        while True:
            page = catalog.features("", "", size, token)
            assert len(page.features) <= size
            parts += found(page)
            token = page.next_page_token
            if not token:
                break
        assert parts == whole


def test_a_page_of_long_examples_ends_early(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "PAGE_CHARS", 10)
    page = catalog.features("", "", 1000, "")
    assert found(page) == [("late", 0)]
    assert page.next_page_token


def test_a_token_belongs_to_its_search(catalog: Catalog) -> None:
    token = catalog.features("", "", 1, "").next_page_token
    with pytest.raises(InvalidRequest, match="page_token"):
        catalog.features("", "french", 1, token)
    with pytest.raises(InvalidRequest, match="page_token"):
        catalog.features("mid", "", 1, token)


@given(token=st.text(min_size=1))
def test_a_made_up_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequest, match="page_token"):
        Catalog({}).features("", "", 1, token)


def test_names_and_numbers_that_are_not_served(catalog: Catalog) -> None:
    for look in (lambda: catalog.feature("nope", 0), lambda: catalog.features("nope", "", 0, "")):
        with pytest.raises(UnknownName, match="served are late, mid"):
            look()
    with pytest.raises(InvalidRequest, match="features 0 to 7, got 8"):
        catalog.feature("mid", 8)
    with pytest.raises(InvalidRequest, match="page_size"):
        catalog.features("", "", 1001, "")
    assert catalog.feature("mid", 7) == Feature("mid", 7)
