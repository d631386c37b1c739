"""Whatever company a request has, it is answered as if alone: the engine's three promises, on real models.

Prompts that begin alike, every kind of steering, parts of any size, too little memory, cancellations, inspections;
against Hugging Face's ``generate`` with plain hooks, one request at a time.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saeguard.requests import FeatureSelection, GenerateRequest, Sampling, TokenInput
from saeguard.types import Add, Cap, Clamp, FeatureRef, Intervention, Scale, Scope, Zero
from saeguard_server.engine.transformers import engine
from saeguard_server.engine.transformers.sequence import BLOCK
from support.alone import Alone
from support.engines import Answer, World, make_world, prompt, running
from support.models import SITES
from support.stepping import Asked, Loaded, Stepped

NEW = 20
LENGTHS = (1, 16, 33, 47, 60, 60)
SEEDS = (11, 11, 11, 12)
"""Prompts of one seed begin alike."""
WATCHED = "resid_pre"
"""Read before every edit of these tests, whatever the steering."""

STEERINGS: tuple[tuple[Intervention, ...], ...] = (
    (),
    (Clamp("resid_post", 4, 4.0),),
    (
        Clamp("resid_post", 4, 4.0, scope=Scope(phase="prompt")),
        Scale("attn_z", 2, -3.0, scope=Scope(phase="generated")),
    ),
    (Add("mlp_out", 9, 3.0, scope=Scope(start=14, end=20)), Zero("resid_post", 7)),
    (Clamp("resid_post", 4, 4.0, scope=Scope(include_special_tokens=True)), Cap("attn_out", 3, 0.1)),
    (Clamp("resid_post", 4, 4.0, scope=Scope(start=40)),),
)


@dataclass(frozen=True)
class Joining:
    """A request that joins before a step, and is dropped before another."""

    request: GenerateRequest | tuple[int, ...]
    """What to generate, or the tokens to inspect."""
    at: int
    dropped_at: int | None


def crowd(draw: random.Random) -> list[Joining]:
    """Drawn evenly, so that most crowds share, run out of memory, and lose somebody: hypothesis prefers small ones."""
    return [_joining(draw) for _ in range(draw.randint(5, 9))]


def _joining(draw: random.Random) -> Joining:
    tokens = tuple(prompt(draw.choice(SEEDS), draw.choice(LENGTHS)))
    at = draw.choice((0, 1, 5, 15, 25))
    dropped_at = at + draw.randint(1, 25) if draw.random() < 0.2 else None
    if draw.random() < 0.15:
        return Joining(tokens, at, dropped_at)
    new, steer = draw.randint(NEW // 2, NEW), draw.choice((STEERINGS[0], *STEERINGS))
    steer = tuple(one for one in steer if _reaches(one.scope, len(tokens), new))
    return Joining(_request(tokens, new, steer, draw.choice((0, 0, 0, 1, 2))), at, dropped_at)


def _request(tokens: tuple[int, ...], new: int, steer: tuple[Intervention, ...], looks: int) -> GenerateRequest:
    sampling = Sampling(max_new_tokens=new, temperature=0.0, logprobs=0, ignore_eos=True, prompt_logprobs=looks == 1)
    watch = (FeatureRef(WATCHED, 7), FeatureRef(WATCHED, 1)) if looks == 2 else ()
    return GenerateRequest(input=TokenInput(tokens), sampling=sampling, interventions=steer, watch=watch)


def _reaches(scope: Scope, prompt_tokens: int, new: int) -> bool:
    """Whether the scope holds a token that is not special and is read; others are refused."""
    first, last = scope.positions(prompt_tokens)
    read = prompt_tokens + new - 1
    return max(first, 0 if scope.include_special_tokens else 1) < min(read if last is None else last, read)


class Truth:
    """What plain transformers says of a world."""

    def __init__(self, world: World) -> None:
        self.world, self.alone = world, Alone(world, least=NEW)
        self.activations = cache(self._activations)
        self.prompt_logprobs = cache(self._prompt_logprobs)

    def _activations(self, point: str, ids: tuple[int, ...]) -> torch.Tensor:
        """[tokens, d_sae] of the SAE at that site."""
        module, side = SITES[self.world.model_type][point]
        target, seen = self.world.model.get_submodule(module), []
        if side == "in":
            handle = target.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        else:
            handle = target.register_forward_hook(lambda _, __, out: seen.append(out))
        with torch.no_grad():
            self.world.model(torch.tensor([ids]))
        handle.remove()
        x = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
        return self.world.saes[point].encode(x[0])

    def _prompt_logprobs(self, ids: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            rows = self.world.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [float(row[token]) for row, token in zip(rows, ids[1:], strict=False)]

    def check(self, request: GenerateRequest, got: Answer) -> None:
        """A finished generation: tokens, log-probabilities, receipt, readings.

        Raises:
            AssertionError: it would have been another answer alone.
        """
        self.alone.check(request, got)
        assert isinstance(request.input, TokenInput)
        read = (*request.input.ids, *got.ids[:-1])
        if request.watch:
            assert [one.position for one in got.readings] == list(range(len(read)))
            wanted = self.activations(WATCHED, read)[:, [one.feature for one in request.watch]]
            near(torch.tensor([one.values for one in got.readings]), wanted)
        if request.sampling.prompt_logprobs:
            assert len(got.prompt_logprobs) == len(request.input.ids) - 1
            if not request.interventions:
                near(torch.tensor(got.prompt_logprobs), torch.tensor(self.prompt_logprobs(request.input.ids)))

    def check_inspection(self, tokens: tuple[int, ...], got: Asked) -> None:
        """A finished inspection: every token once, in order, with the features that fired.

        Raises:
            AssertionError: it is not what the plain encoder says.
        """
        features = self.activations("resid_post", tokens)
        at = 0
        for part in got.parts:
            assert part.start == at
            assert [one.id for one in part.tokens] == list(tokens[at : at + len(part.tokens)])
            values = torch.tensor(part.values.tolist()).view(len(part.tokens), 2)
            near(values, features[at : at + len(part.tokens), [4, 9]])
            at += len(part.tokens)
        assert at == len(tokens)
        assert [part.last for part in got.parts] == [False] * (len(got.parts) - 1) + [True]


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


PICKS = (("resid_post", FeatureSelection([FeatureRef("resid_post", feature) for feature in (4, 9)])),)


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(make_world(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def loaded(truth: Truth) -> Loaded:
    return Loaded(truth.world)


@given(
    seed=st.integers(0, 2**32),
    slots=st.sampled_from((5, 4, 2)),
    prefill_tokens=st.sampled_from((200, 64, 30, 16, 7, 3, 1)),
    blocks=st.sampled_from((6, 7, 9, 20)),
    reuse=st.sampled_from((True, True, True, False)),
)
@settings(max_examples=7, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_everybody_is_answered_as_if_alone(
    truth: Truth, loaded: Loaded, seed: int, slots: int, prefill_tokens: int, blocks: int, reuse: bool
) -> None:
    requests = crowd(random.Random(seed))
    one = loaded.core(slots=slots, prefill_tokens=prefill_tokens, blocks=blocks, reuse=reuse)
    asked = take_steps(one, requests)
    for joined, got in zip(requests, asked, strict=True):
        if joined.dropped_at is not None and not got.ends:
            continue
        assert len(got.ends) == 1, got.events
        if isinstance(joined.request, tuple):
            truth.check_inspection(joined.request, got)
        else:
            truth.check(joined.request, got.answer)
    assert one.is_empty()


def take_steps(one: Stepped, requests: list[Joining], most: int = 2000) -> list[Asked]:
    """Everybody joins and is dropped when it says -> what each got, in the order of ``requests``."""
    asked: dict[int, Asked] = {}
    for step in range(most):
        for index, joined in enumerate(requests):
            if joined.at == step:
                inspects = isinstance(joined.request, tuple)
                asked[index] = one.inspect(joined.request, PICKS) if inspects else one.ask(joined.request)  # type: ignore[arg-type]
            if joined.dropped_at == step:
                one.cancel(asked[index])
        if len(asked) == len(requests) and not one.core.scheduler.has_work:
            return [asked[index] for index in range(len(requests))]
        one.step()
    raise AssertionError("still at work")


@pytest.mark.parametrize("reuse", [True, False])
def test_who_gave_its_memory_up_is_answered_as_if_it_had_not(truth: Truth, loaded: Loaded, reuse: bool) -> None:
    """Six requests that each come to need five blocks, and nine in all; steered, watching, with log-probabilities."""
    one = loaded.core(slots=6, prefill_tokens=24, blocks=9, reuse=reuse)
    requests = [
        _request(tuple(prompt(SEEDS[index % 4], length)), 40, STEERINGS[index % 3], index % 4)
        for index, length in enumerate((16, 31, 17, 25, 38, 40))
    ]
    asked = [one.ask(request) for request in requests]
    one.finish()
    assert one.metric("saeguard_preemptions_total") >= 2
    for request, got in zip(requests, asked, strict=True):
        assert len(got.ends) == 1
        truth.check(request, got.answer)
    assert one.is_empty()


def test_who_gave_its_memory_up_within_its_prompt_is_told_everything_once(truth: Truth, loaded: Loaded) -> None:
    one = loaded.core(slots=2, prefill_tokens=3, blocks=6)
    first = one.ask(_request(tuple(prompt(SEEDS[0], 14)), 40, (), 0))
    one.step()
    sampling = Sampling(max_new_tokens=NEW, temperature=0.0, logprobs=0, ignore_eos=True, prompt_logprobs=True)
    request = GenerateRequest(
        input=TokenInput(tuple(prompt(SEEDS[0], 60))), sampling=sampling, watch=(FeatureRef(WATCHED, 7),)
    )
    watching = one.ask(request)
    while not one.metric("saeguard_preemptions_total"):
        one.step()
    assert len(watching.answer.readings) > 20, "it was in the middle of its prompt"
    one.finish()
    truth.check(request, watching.answer)
    assert len(first.answer.ids) == 40
    assert one.is_empty()


def test_who_gave_its_memory_up_draws_what_it_would_have_drawn(truth: Truth, loaded: Loaded) -> None:
    """Against a core with memory for all: ``generate`` draws other numbers."""
    sampling = Sampling(
        max_new_tokens=40, temperature=1.3, top_p=0.95, repetition_penalty=1.3, logprobs=2, ignore_eos=True, seed=77
    )
    requests = [
        GenerateRequest(
            input=TokenInput(tuple(prompt(seed, 12 + 8 * index))), sampling=sampling, interventions=STEERINGS[index]
        )
        for index, seed in enumerate((11, 11, 12, 12))
    ]
    answers = []
    for blocks in (60, 8):
        one = loaded.core(slots=4, prefill_tokens=24, blocks=blocks)
        asked = [one.ask(request) for request in requests]
        one.finish()
        answers.append([got.answer for got in asked])
        assert (one.metric("saeguard_preemptions_total") > 1) == (blocks == 8)
    for ample, scarce in zip(*answers, strict=True):
        assert ample.ids == scarce.ids
        assert ample.text == scarce.text


async def test_the_running_engine_in_a_crowd(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on the engine's thread, with what asyncio makes of it: 30 requests, some of which hang up."""
    monkeypatch.setattr(engine, "kv_blocks", lambda *_: 14)
    requests = [
        _request(
            tuple(prompt(SEEDS[index % 4], LENGTHS[index * 5 % 6])), 5 + index % 4,
            tuple(one for one in STEERINGS[index % 6] if _reaches(one.scope, LENGTHS[index * 5 % 6], 5)), index % 4,
        )
        for index in range(30)
    ]  # fmt: skip
    with running(truth.world.settings(max_slots=5, prefill_tokens=9)) as one:
        assert one.engine.model.max_context == 14 * BLOCK or one.engine.model.max_context == 128

        async def ask(index: int) -> Any:
            await asyncio.sleep(0.003 * (index % 7))
            return await one.ask(requests[index], stop_after=2 if index % 5 == 4 else None)

        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(ask(index) for index in range(30)))
        for index, answer in enumerate(answers):
            if index % 5 != 4:
                truth.check(requests[index], answer)
        for _ in range(200):
            if one.engine._core.scheduler.blocks.in_use == 0:
                break
            await asyncio.sleep(0.01)
        scheduler = one.engine._core.scheduler
        assert (scheduler.slots_in_use, scheduler.blocks.in_use, one.engine.queued()) == (0, 0, 0)
