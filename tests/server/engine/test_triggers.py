"""Conditions, triggers and stops on a real model, whatever the company: against plain hooks and plain Python."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from saeguard.requests import GenerateRequest
from saeguard.types import (
    Add,
    Apply,
    Clamp,
    Condition,
    FeatureRef,
    Flag,
    Operator,
    Scale,
    Scope,
    Stop,
    Term,
    Trigger,
    Window,
    WindowKind,
    Zero,
)
from support.engines import Answer, World, greedy, make_world, prompt
from support.guarding import POINTS, Outcome, Plain
from support.stepping import Asked, Loaded

NEW = 10
COMPARISONS: tuple[Operator, ...] = ("above", "at_least", "below", "at_most")
WINDOWS: tuple[WindowKind, ...] = ("this_token", "any_so_far", "maximum", "rolling_mean", "k_of_n")
PROMPTS = (prompt(11, 31), prompt(11, 47), prompt(12, 15), prompt(12, 20))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(world: World) -> Loaded:
    return Loaded(world)


@pytest.fixture(scope="module")
def plain(world: World) -> Plain:
    return Plain(world)


def when(point: str, feature: int, threshold: float = 0.4, **more: Any) -> Condition:
    return Condition(terms=(Term(point, feature),), threshold=threshold, **more)


def some_condition(draw: random.Random, deepest: int) -> Condition:
    """One that is decided at that of the points, or earlier."""
    points = [draw.choice(POINTS[: deepest + 1]) for _ in range(draw.choice((1, 1, 2, 4)))]
    refs = {FeatureRef(point, draw.randrange(96)) for point in points}
    comparison, kind = draw.choice(COMPARISONS[:3]), draw.choice(WINDOWS)
    threshold = draw.uniform(0.2, 1.0)
    tokens, slack = draw.choice((2, 3, 8)), draw.choice((None, 0.3))
    if kind in ("any_so_far", "k_of_n"):
        slack = None
    release = None if slack is None else threshold + (slack if comparison == "below" else -slack)
    return Condition(
        terms=tuple(Term(ref.sae, ref.feature, draw.choice((1.0, 0.7, -0.4))) for ref in sorted(refs, key=repr)),
        bias=draw.choice((0.0, 0.15)),
        threshold=threshold if comparison != "below" else -0.2,
        comparison=comparison,
        release=release if comparison != "below" else (None if slack is None else 0.1),
        window=Window(kind, tokens, draw.randint(1, tokens)),
        scope=Scope(phase=draw.choice(("all", "all", "prompt", "generated")), start=draw.choice((0, 0, 5))),
    )


_SOMETIMES: dict[str, Any] = {"window": Window("k_of_n", 8, 2), "release": None}


def some_request(draw: random.Random) -> GenerateRequest:
    features = draw.sample(range(96), 3)
    kinds = (
        Clamp("resid_post", 0, 3.0),
        Scale("resid_post", 0, -2.0),
        Add("resid_post", 0, 2.0),
        Zero("resid_post", 0),
    )
    gated = tuple(
        replace(draw.choice(kinds), sae=point, feature=feature, when=some_condition(draw, POINTS.index(point)))
        for point, feature in zip(draw.sample(POINTS, 2), features[:2], strict=True)
    )
    applied = replace(draw.choice(kinds), feature=features[2], scope=Scope(phase=draw.choice(("all", "generated"))))
    triggers = (
        Trigger("flag", some_condition(draw, 4), Flag()),
        Trigger("apply", some_condition(draw, 4), Apply((applied,))),
        Trigger(
            "stop",
            replace(some_condition(draw, 4), scope=Scope(phase=draw.choice(("all", "generated"))), **_SOMETIMES),
            Stop(),
        ),
    )
    chosen = draw.sample(triggers, draw.randint(0, 3))
    if any(one.ref == applied.ref for one in gated):
        gated = ()
    return greedy(draw.choice(PROMPTS), NEW, interventions=gated, triggers=tuple(chosen))


def check(request: GenerateRequest, got: Answer, wanted: Outcome) -> None:
    assert got.ids == wanted.ids
    done = got.completion
    assert done is not None
    assert done.usage.generated_tokens == len(wanted.ids)
    assert (done.stopped_by.name if done.stopped_by else "") == wanted.stopped_by
    assert done.finish_reason == ("feature" if wanted.stopped_by else "length")
    if not request.triggers and not request.interventions:
        assert done.receipt is None
        return
    assert done.receipt is not None
    assert [one.name for one in done.receipt.triggers] == [trigger.name for trigger in request.triggers]
    for one, guard in zip(done.receipt.triggers, wanted.triggers, strict=True):
        # A prompt in which one stops is not read to its end: the others have seen less than the reference's.
        if not wanted.stopped_by or one.name == wanted.stopped_by:
            assert one.first_position == (guard.positions[0] if guard.positions else None)
        if not wanted.stopped_by:
            assert (one.tokens_evaluated, one.tokens_on) == (len(guard.values), len(guard.positions))
            assert one.maximum == pytest.approx(max(guard.values, default=-float("inf")), abs=1e-4)
    if not wanted.stopped_by:
        assert [one.tokens_edited for one in done.receipt.interventions] == wanted.edited


def crowd(seed: int, loaded: Loaded, plain: Plain, counted: Counter[str]) -> list[Outcome]:
    """Parts of any size, too little memory, prompts that begin alike, the same requests again."""
    draw = random.Random(seed)
    requests = [some_request(draw) for _ in range(4)]
    wanted = [plain.answer(one) for one in requests]
    core = loaded.core(prefill_tokens=(7, 16, 200)[seed % 3], blocks=(5, 40)[seed % 2], slots=4)
    asked: list[tuple[int, Asked]] = []
    for steps in ((0, 0, 1), (1, 9, 40)):
        for index in draw.sample(range(4), 4):
            asked.append((index, core.ask(requests[index])))
            for _ in range(draw.choice(steps)):
                core.step()
        core.finish()
    for index, one in asked:
        check(requests[index], one.answer, wanted[index])
    assert core.is_empty()
    for name in ("saeguard_preemptions_total", "saeguard_prompt_tokens_reused_total"):
        counted[name] += int(core.metric(name))
    return wanted


def test_in_any_company_everything_is_decided_as_if_alone(loaded: Loaded, plain: Plain) -> None:
    seen, counted = set(), Counter[str]()
    for outcome in (one for seed in range(4) for one in crowd(seed, loaded, plain, counted)):
        where = "the answer" if outcome.ids else "the prompt"
        seen.add(f"stopped in {where}" if outcome.stopped_by else "ended")
        seen.update("partly on" for one in outcome.triggers if 0 < len(one.positions) < len(one.values))
        seen.update("edited" for count in outcome.edited if 0 < count < NEW)
    assert seen == {"stopped in the prompt", "stopped in the answer", "ended", "partly on", "edited"}
    assert all(counted.values()), "nobody lost its memory, or nobody found what others had read"
