"""The mixing buffer: nothing is lost or given twice, rows stay together, and any moment can be gone back to."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saeguard_sae.models import Site
from saeguard_sae.train.stream import Buffer, buffer_bytes

A, B = Site(0, "resid_post"), Site(1, "mlp_act")
WIDTHS = {A: 2, B: 3}
CPU = torch.device("cpu")


def new(capacity: int, seed: int = 5, dtype: torch.dtype = torch.float32) -> Buffer:
    return Buffer(WIDTHS, capacity, dtype, CPU, seed)


def numbered(start: int, count: int) -> dict[Site, Tensor]:
    """Tokens that say who they are at every site."""
    number = torch.arange(start, start + count).float()[:, None]
    return {site: number * 2 + torch.arange(width) for site, width in WIDTHS.items()}


def numbers(tokens: dict[Site, Tensor]) -> list[int]:
    """Who they are, the same at every site."""
    found = [(x - torch.arange(x.shape[1])) / 2 for x in tokens.values()]
    assert all(torch.equal(x, x[:, :1].expand_as(x)) for x in found)
    assert torch.equal(found[0][:, 0], found[1][:, 0])
    return [int(one) for one in found[0][:, 0]]


ACTIONS = st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60)


def act(buffer: Buffer, actions: list[tuple[bool, int]], start: int) -> tuple[list[list[int]], int]:
    """Adds and draws, as far as there is place and there are tokens; what was drawn, and the next token's number."""
    drawn: list[list[int]] = []
    for is_add, n in actions:
        if is_add:
            n = min(n, buffer.free)
            buffer.add(numbered(start, n))
            start += n
        else:
            drawn.append(numbers(buffer.draw(min(n, buffer.filled))))
    return drawn, start


@given(capacity=st.integers(1, 30), actions=ACTIONS)
def test_each_token_is_drawn_once(capacity: int, actions: list[tuple[bool, int]]) -> None:
    buffer = new(capacity)
    drawn, added = act(buffer, actions, 0)
    given_out = [number for some in drawn for number in some]
    assert buffer.filled + buffer.free == capacity
    rest = numbers(buffer.draw(buffer.filled))
    assert sorted(given_out + rest) == list(range(added))


@given(capacity=st.integers(1, 30), before=ACTIONS, behind=ACTIONS)
def test_goes_on_where_it_was(capacity: int, before: list[tuple[bool, int]], behind: list[tuple[bool, int]]) -> None:
    buffer = new(capacity)
    _, start = act(buffer, before, 0)
    file = io.BytesIO()
    torch.save(buffer.state(), file)
    wanted, _ = act(buffer, behind, start)
    state: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = new(capacity, seed=99)
    resumed.resume(state)
    assert act(resumed, behind, start)[0] == wanted


def kept_full(buffer: Buffer, draws: int, batch: int, chunk: int) -> list[list[int]]:
    """Draws as a stream does: filled up by the chunk before each."""
    start, drawn = 0, []
    for _ in range(draws):
        while buffer.free >= chunk:
            buffer.add(numbered(start, chunk))
            start += chunk
        drawn.append(numbers(buffer.draw(batch)))
    return drawn


def test_mixes_over_half_of_the_capacity() -> None:
    """Tokens of one draw come from all over the last thousand and from before: a uniform draw's spread would be 289."""
    drawn = kept_full(new(1000), draws=300, batch=20, chunk=25)
    spread = torch.tensor([torch.tensor(some).float().std() for some in drawn[50:]]).mean()
    assert 289 < float(spread) < 900
    neighbours = sum(abs(a - b) == 1 for some in drawn for a, b in pairwise(some))
    assert neighbours < 60, "of 5,700 pairs, a uniform draw from 1,000 has about 11"


def test_no_token_stays_long() -> None:
    """A token is out after a few capacities: each shuffle draws half of what is held."""
    drawn = kept_full(new(200), draws=400, batch=10, chunk=10)
    ages = [turn * 10 + 200 - number for turn, some in enumerate(drawn) for number in some]
    assert max(ages) < 200 * 12
    assert min(ages) >= 0


def test_the_seed_decides() -> None:
    one, same, other = (kept_full(new(100, seed), 20, 10, 10) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_draw_shuffles_only_when_half_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    shuffle = torch.randperm

    def counted(n: int, **given: Any) -> Tensor:
        calls.append(n)
        return shuffle(n, **given)

    monkeypatch.setattr(torch, "randperm", counted)
    kept_full(new(1000), draws=200, batch=10, chunk=10)
    assert len(calls) <= 1 + 200 * 10 // 490


def test_bfloat16_is_kept_and_float32_given() -> None:
    buffer = new(10, dtype=torch.bfloat16)
    x = {A: torch.full((4, 2), 1.0 + 2**-12), B: torch.zeros(4, 3)}
    buffer.add(x)
    drawn = buffer.draw(4)
    assert drawn[A].dtype == torch.float32
    assert torch.equal(drawn[A], torch.ones(4, 2))


def test_bytes() -> None:
    buffer = new(64, dtype=torch.bfloat16)
    stored = sum(one.nbytes for one in buffer._storage.values())
    assert stored < buffer_bytes(WIDTHS, 64, torch.bfloat16) <= stored + 3 * 8 * 64
