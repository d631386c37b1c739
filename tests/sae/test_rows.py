"""Tokens that lie flat, as groups of cells: every token in one cell, its own, and back in its place."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard_sae.rows import Group, Rows, RowSpan


@st.composite
def passes(draw: st.DrawFn) -> tuple[list[RowSpan], int]:
    """Spans in any order, with gaps between them, and the number of tokens."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    slots = draw(st.permutations(range(12)))
    spans, at = [], 0
    for slot, length in zip(slots, lengths, strict=False):
        at += draw(st.integers(0, 2))
        spans.append(RowSpan(slot, at, length))
        at += length
    return draw(st.permutations(spans)), at + draw(st.integers(0, 2))


def flat(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of that many tokens: x [tokens, 2], positions and special flags that tell each from the others."""
    at = torch.arange(tokens)
    return torch.stack([at * 1.0, at * 100.0], dim=-1), at + 1000, at % 3 == 0


@given(passes())
@settings(max_examples=150, deadline=None)
def test_every_token_of_a_span_is_in_one_cell_of_its_slot(one: tuple[list[RowSpan], int]) -> None:
    spans, tokens = one
    x, positions, special = flat(tokens)
    seen = {}
    for group in Rows.of(spans, positions, special).groups:
        cells = group.take(x)
        assert cells.shape[:2] == group.positions.shape == group.special.shape
        assert cells.shape[:2] == (len(group.slots), max(group.lengths))
        for row, (slot, length) in enumerate(zip(group.slots, group.lengths, strict=True)):
            mine = cells[row, :length, 0].int()
            seen[slot] = mine.tolist()
            assert group.positions[row, :length].tolist() == (mine + 1000).tolist()
            assert group.special[row, :length].tolist() == (mine % 3 == 0).tolist()
            assert (group.positions[row, length:] == -1).all(), "a padded cell is in some edit's scope"
            assert (cells[row, length:, 0] == mine[-1]).all()
    assert seen == {slot: list(range(start, start + length)) for slot, start, length in spans}


@given(passes())
@settings(max_examples=150, deadline=None)
def test_what_is_put_back_is_in_its_place_and_nothing_else_changes(one: tuple[list[RowSpan], int]) -> None:
    spans, tokens = one
    x, positions, special = flat(tokens)
    out = torch.full_like(x, -7.0)
    for group in Rows.of(spans, positions, special).groups:
        cells = group.take(x).clone()
        cells[group.positions < 0] = torch.nan  # what padded cells hold must go nowhere
        group.put(cells, out)
    inside = torch.zeros(tokens, dtype=torch.bool)
    for _, start, length in spans:
        inside[start : start + length] = True
    assert torch.equal(out[inside], x[inside])
    assert (out[~inside] == -7.0).all()


@given(passes())
@settings(max_examples=60, deadline=None)
def test_less_than_half_of_the_cells_are_padded(one: tuple[list[RowSpan], int]) -> None:
    spans, tokens = one
    for group in Rows.of(spans, *flat(tokens)[1:]).groups:
        cells = group.positions.numel()
        assert cells < 2 * sum(group.lengths)
        assert (group.filled is None) == (cells == sum(group.lengths))


def test_single_tokens_that_lie_together_are_a_view() -> None:
    x, positions, special = flat(6)
    for group in (
        Group.singles((4, 2, 9), positions, special),
        _only([RowSpan(4, 1, 1), RowSpan(2, 2, 1), RowSpan(9, 3, 1)]),
    ):
        assert isinstance(group.tokens, slice)
        assert group.take(x).data_ptr() == x[group.tokens].data_ptr()
        assert group.slots == (4, 2, 9)
        assert group.positions.flatten().tolist() == positions[group.tokens].tolist()
    assert not isinstance(_only([RowSpan(4, 1, 1), RowSpan(2, 3, 1)]).tokens, slice)


def _only(spans: list[RowSpan]) -> Group:
    (group,) = Rows.of(spans, *flat(6)[1:]).groups
    return group


def test_no_spans_are_no_groups() -> None:
    assert Rows.of([], *flat(0)[1:]).groups == () == Rows().groups
