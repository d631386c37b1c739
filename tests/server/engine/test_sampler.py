"""The sampler against Hugging Face's own processors, and one request against itself in other company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from saeguard.requests import Sampling
from saeguard_server.engine.transformers.sampler import Sampler

VOCAB, SLOTS, STEPS = 50, 6, 400


def logits(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def sampler(requests: dict[int, Sampling], seed: int = 1, prompt: tuple[int, ...] = (1, 2, 3)) -> Sampler:
    made = Sampler(SLOTS, STEPS, VOCAB, torch.device("cpu"))
    for slot, one in requests.items():
        made.write(slot, one, seed + slot, STEPS, prompt)
    return made


def theirs(scores: Tensor, one: Sampling, prompt: tuple[int, ...]) -> Tensor:
    """[vocabulary] probabilities as Hugging Face computes them."""
    ids, scores = torch.tensor([prompt]), scores.clone()
    steps: list[Any] = []
    if one.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(one.repetition_penalty))
    steps.append(TemperatureLogitsWarper(one.temperature))
    if one.top_k:
        steps.append(TopKLogitsWarper(one.top_k))
    if one.top_p < 1:
        steps.append(TopPLogitsWarper(one.top_p))
    if one.min_p:
        steps.append(MinPLogitsWarper(one.min_p))
    for step in steps:
        scores = step(ids, scores)
    return scores.softmax(-1)[0]


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6, top_k=7),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
]


@pytest.mark.parametrize("one", SETTINGS)
def test_draws_follow_hugging_face_probabilities(one: Sampling) -> None:
    scores, prompt = logits(11), (1, 2, 3, 40)
    wanted = theirs(scores, one, prompt)
    counts = torch.zeros(VOCAB)
    for seed in range(5):
        made = Sampler(1, STEPS, VOCAB, torch.device("cpu"))
        made.write(0, one, seed, STEPS, prompt)
        for _ in range(STEPS):
            counts[made.sample(scores, (0,)).token] += 1
            if one.repetition_penalty != 1:
                made._seen[0] = False
                made._seen[0, list(prompt)] = True
    assert not counts[wanted == 0].any(), "a filtered token was drawn"
    drawn = counts / counts.sum()
    assert float((drawn - wanted).abs().sum()) / 2 < 0.06  # total variation at 2,000 draws


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1), others=st.lists(st.sampled_from([*SETTINGS, Sampling(temperature=0.0)]), max_size=4)
)
def test_a_request_draws_the_same_in_any_company(seed: int, others: list[Sampling]) -> None:
    one, steps = SETTINGS[4], [logits(100 + step, SLOTS) for step in range(12)]
    alone = Sampler(SLOTS, STEPS, VOCAB, torch.device("cpu"))
    alone.write(0, one, seed, STEPS, (5,))
    crowd = sampler(dict(enumerate(others)))
    mine = len(others)
    crowd.write(mine, one, seed, STEPS, (5,))
    for step in steps:
        row = step[mine : mine + 1]
        chosen = crowd.sample(step[: mine + 1], tuple(range(mine + 1))).token[mine]
        assert alone.sample(row, (0,)).token.item() == chosen


def test_a_request_that_was_interrupted_goes_on_as_if_nothing_had_happened() -> None:
    """In another slot, with its tokens so far; the penalty needs all of them."""
    sampling = Sampling(temperature=1.0, repetition_penalty=1.4, top_p=0.9)
    whole, first, second = (Sampler(SLOTS, STEPS, VOCAB, torch.device("cpu")) for _ in range(3))
    for made in (whole, first):
        made.write(0, sampling, 77, STEPS, [5])
    wanted = [whole.sample(logits(step), (0,)).token.item() for step in range(10)]
    tokens = [5, *(int(first.sample(logits(step), (0,)).token.item()) for step in range(4))]
    second.write(3, sampling, 77, STEPS, tokens, generated=4)
    assert [*tokens[1:], *(second.sample(logits(step), (3,)).token.item() for step in range(4, 10))] == wanted


def test_greedy_takes_the_largest_and_ignores_filters() -> None:
    made = sampler({0: Sampling(temperature=0.0, top_k=3, min_p=0.5)})
    scores = logits(3)
    assert made.sample(scores, (0,)).token.tolist() == scores.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_marked_and_the_others_are_not(bad: float) -> None:
    made = sampler({slot: SETTINGS[slot] for slot in range(3)})
    clean = sampler({slot: SETTINGS[slot] for slot in range(3)})
    scores = logits(4, 3)
    poisoned = scores.clone()
    poisoned[1, 7] = bad
    found, wanted = made.sample(poisoned, tuple(range(3))).token, clean.sample(scores, tuple(range(3))).token
    assert found[1] == -1
    assert found[[0, 2]].tolist() == wanted[[0, 2]].tolist()


def test_logprobs_are_the_models_own() -> None:
    made = sampler({0: Sampling(temperature=0.5, top_k=2, logprobs=4), 1: Sampling()})
    scores = logits(5, 2)
    picked = made.sample(scores, tuple(range(2)))
    own = scores.log_softmax(-1)
    assert picked.logprob is not None
    assert picked.top is not None
    torch.testing.assert_close(picked.logprob[0], own[0, picked.token[0]])
    torch.testing.assert_close(picked.top[0][0], own[0].topk(4).values)


def test_every_bit_of_the_seed_counts() -> None:
    drawn = set()
    for seed in (1, 1 + 2**32, 1 + 2**63, 2**64 - 1):
        made = Sampler(1, STEPS, VOCAB, torch.device("cpu"))
        made.write(0, Sampling(), seed, STEPS, (1,))
        drawn.add(tuple(made.sample(torch.zeros(1, VOCAB), (0,)).token.item() for _ in range(8)))
    assert len(drawn) == 4
