"""Counts by bins are numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeguard_sae.train.quality.feature_stats import histogram_of_counts, histogram_of_values


def test_values_are_counted_as_numpy_counts_them() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(2)).double()
    edges = torch.linspace(-5, 5, 31, dtype=torch.float64)
    found = histogram_of_values(values, edges)
    counts, borders = np.histogram(values.numpy(), edges.numpy())
    assert found.counts == tuple(counts.tolist())
    assert found.edges == pytest.approx(borders.tolist())


def test_values_beyond_the_edges_count_in_the_outermost_bins() -> None:
    found = histogram_of_values(torch.tensor([-3.0, 0.0, 0.5, 1.0, 9.0]), torch.tensor([0.0, 0.5, 1.0]))
    assert found.counts == (2, 3)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=400))
def test_whole_numbers_keep_their_sum_and_place(counts: list[int]) -> None:
    found = histogram_of_counts(torch.tensor(counts))
    assert sum(found.counts) == sum(counts)
    assert len(found.counts) == len(found.edges) - 1 <= 64
    numbers = [at for at, count in enumerate(counts) for _ in range(count)]
    if numbers:
        assert found.counts == tuple(np.histogram(numbers, found.edges)[0].tolist())
        assert found.edges[0] == min(numbers)
