"""The divergence of two runs against the formula in float64, whatever the parts in which they are read."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from saeguard_server.engine.protocol import Divergence, Side
from saeguard_server.errors import NonFiniteOutput

TOKENS, VOCABULARY, FIRST = 12, 40, 5


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def wanted(steered: torch.Tensor, unsteered: torch.Tensor) -> list[float]:
    p, q = (softmax(side.double().numpy(), axis=-1) for side in (steered, unsteered))
    return list(rel_entr(p, q).sum(axis=-1)[FIRST:])


cuts = st.sets(st.integers(1, TOKENS - 1), max_size=4).map(lambda inside: sorted({0, TOKENS} | inside))
parts = cuts.map(lambda at: list(pairwise(at)))


@given(parts, parts, parts, st.randoms(use_true_random=False))
def test_parts_and_their_order_do_not_matter(
    steered: list[tuple[int, int]], unsteered: list[tuple[int, int]], again: list[tuple[int, int]], draw: random.Random
) -> None:
    """``again``: one side gives its memory up at some time and is read from the first token."""
    sides: dict[Side, torch.Tensor] = {"steered": logits(71), "unsteered": logits(72)}
    told: list[tuple[Side, int, int]] = [("steered", *part) for part in (*steered, *again)]
    told += [("unsteered", *part) for part in unsteered]
    draw.shuffle(told)
    one = Divergence(FIRST, TOKENS - FIRST)
    for side, start, end in told:
        one.offer(side, start, sides[side][start:end])
    assert one.result() == pytest.approx(wanted(*sides.values()), abs=1e-5)


def test_the_same_model_twice_differs_in_nothing() -> None:
    one = Divergence(FIRST, TOKENS - FIRST)
    one.offer("steered", 0, logits(73))
    one.offer("unsteered", 0, logits(73))
    assert one.result() == (0.0,) * (TOKENS - FIRST)


def test_what_is_not_a_number_is_said() -> None:
    one = Divergence(0, 1)
    one.offer("steered", 0, torch.full((1, 4), float("nan")))
    one.offer("unsteered", 0, torch.zeros(1, 4))
    with pytest.raises(NonFiniteOutput):
        one.result()
