"""The n largest, against a whole sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard_sae.encoding import largest_per_row


@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1, 7, 48, 512, 1536, 4096, 4098]),
    n=st.integers(0, 40),
    ties=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_values_and_columns(seed: int, size: int, n: int, ties: bool) -> None:
    values, n = torch.randn(5, size, generator=torch.Generator().manual_seed(seed)), min(n, size)
    values = values.mul(3).round() if ties else values
    found, index = largest_per_row(values, n)
    assert found.equal(values.sort(dim=-1, descending=True).values[:, :n])
    assert values.gather(1, index).equal(found)
    assert all(len(set(row)) == n for row in index.tolist())


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.bfloat16])
def test_every_type_that_is_ranked(dtype: torch.dtype) -> None:
    values = (torch.randn(3, 6144, generator=torch.Generator().manual_seed(4)) * 900).to(dtype)
    found, index = largest_per_row(values, 17)
    assert found.equal(values.sort(dim=-1, descending=True).values[:, :17])
    assert values.gather(1, index).equal(found)


def test_not_a_number_is_largest_as_in_topk() -> None:
    values = torch.zeros(2, 4096)
    values[:, 77] = torch.nan
    assert largest_per_row(values, 3)[1][:, 0].tolist() == [77, 77]
