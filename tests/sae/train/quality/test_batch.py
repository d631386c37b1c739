"""Rows become batches in their order, pad_rows at the end, and padding counts for nothing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from saeguard_sae.train.quality.evaluation_data import EvaluationRow, evaluation_batches, pad_rows


def row(length: int, start: int) -> EvaluationRow:
    ids = torch.arange(start, start + length)
    return EvaluationRow(ids, ids % 3 != 0)


@given(st.lists(st.integers(1, 12), max_size=20), st.integers(1, 40))
def test_every_token_comes_once_in_order(lengths: list[int], tokens: int) -> None:
    rows = [row(length, 100 * at) for at, length in enumerate(lengths)]
    found = list(evaluation_batches(rows, tokens))
    assert [one for batch in found for one in batch.ids[batch.real].tolist()] == [
        one for each in rows for one in each.ids.tolist()
    ]
    assert sum(int(batch.ordinary.sum()) for batch in found) == sum(int(one.ordinary.sum()) for one in rows)
    assert all(batch.ids.numel() <= tokens or len(batch.ids) == 1 for batch in found)
    assert not any((batch.ordinary & ~batch.real).any() for batch in found)


def test_positions_whose_next_token_is_text() -> None:
    batch = pad_rows([row(4, 0), row(2, 0), row(1, 0)])
    assert batch.predicted.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
