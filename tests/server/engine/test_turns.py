"""Assistant turns of a chat count as generated: as plain ``generate`` with hooks on those tokens, in any company."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from saeguard.types import Add, Clamp, Condition, Flag, Intervention, Scope, Term, Trigger
from saeguard_server.caller import Call
from saeguard_server.engine.protocol import GenerateTask
from saeguard_server.engine.transformers.sequence import BLOCK
from saeguard_server.steering import TokenRange, compile_steering
from support import reference
from support.alone import SPECIAL, change
from support.engines import World, greedy, make_world, prompt
from support.models import PAD, SITES
from support.stepping import Asked, Loaded, Stepped

NEW = 12
GENERATED = Scope(phase="generated")
Turns = tuple[tuple[int, int], ...]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(world: World) -> Loaded:
    return Loaded(world)


def some_turns(draw: random.Random, length: int) -> Turns:
    ends = sorted(draw.sample(range(1, length), 2 * draw.randint(0, 3)))
    return tuple(zip(ends[::2], ends[1::2], strict=True))


def ask(core: Stepped, ids: list[int], turns: Turns, edits: tuple[Intervention, ...], **more: Any) -> Asked:
    reach = TokenRange(tuple(ids), len(ids) + NEW - 1, core.core.model.tokenizer.special_ids, turns)
    steering = compile_steering(core.engine, edits, None, reach, **more)
    call, sampling = Call("test", time.monotonic() + 60), greedy(ids, NEW).sampling
    return core.submit(
        GenerateTask(call=call, tokens=tuple(ids), sampling=sampling, max_new_tokens=NEW, seed=1, steering=steering)
    )


def counts(ids: list[int], turns: Turns, at: int, scope: Scope) -> bool:
    is_generated = at >= len(ids) - 1 or any(first - 1 <= at < last for first, last in turns)
    return (scope.phase != "generated" or is_generated) and at >= scope.start and (scope.end is None or at < scope.end)


def check(world: World, ids: list[int], turns: Turns, edits: tuple[Intervention, ...], got: Asked) -> None:
    plain = [
        reference.PlainEdit(
            world.saes[edit.sae], *SITES[world.model_type][edit.sae], edit.feature, change(edit),
            lambda at, _, scope=edit.scope: counts(ids, turns, at, scope),
        )
        for edit in edits
    ]  # fmt: skip
    assert got.answer.ids == reference.generate(world.model, ids, NEW, plain, set(SPECIAL)).tokens
    assert got.answer.completion is not None
    receipt = got.answer.completion.receipt
    assert receipt is not None
    read = [*ids, *got.answer.ids[:-1]]
    spared = {at for at, token in enumerate(read) if token in SPECIAL and not 0 < at == len(ids) - 1}
    expected = [
        sum(counts(ids, turns, at, edit.scope) for at in range(len(read)) if at not in spared) for edit in edits
    ]
    assert [entry.tokens_eligible for entry in receipt.interventions] == expected


@pytest.mark.parametrize(
    "how", [{}, {"prefill_tokens": 24, "blocks": 14, "slots": 4}, {"reuse": False, "prefill_tokens": 7}]
)
def test_batched_equals_one_at_a_time(how: dict[str, Any], world: World, loaded: Loaded) -> None:
    draw, core = random.Random(5), loaded.core(**how)
    asked: list[tuple[list[int], Turns, tuple[Intervention, ...], Asked]] = []
    for number in range(14):
        ids = prompt(number % 5, draw.choice((9, 17, 32, 40)))
        if number % 4 == 0:
            ids[-1] = PAD
        turns = some_turns(draw, len(ids))
        late = Scope(phase="generated", start=draw.randint(0, 12), end=draw.choice((None, len(ids) + 3)))
        edits = (Clamp("resid_post", 4, 6.0, scope=GENERATED), Add("resid_pre", 3, 2.0, scope=late))
        edits = (*edits, Add("resid_post", 7, 1.0)) if number % 3 else edits
        asked.append((ids, turns, edits, ask(core, ids, turns, edits)))
        if draw.random() < 0.5:
            core.step()
    core.finish()
    for ids, turns, edits, one in asked:
        check(world, ids, turns, edits, one)


def test_kv_that_other_turns_made_is_not_reused(world: World, loaded: Loaded) -> None:
    core, ids, edits = loaded.core(), prompt(2, 4 * BLOCK + 3), (Clamp("resid_post", 4, 9.0, scope=GENERATED),)
    for turns in (((20, 30),), ((22, 30),), (), ((20, 30), (40, 44)), ((20, 30),)):
        got = ask(core, ids, turns, edits)
        core.finish()
        check(world, ids, turns, edits, got)


def test_a_condition_is_decided_on_turns_alone(loaded: Loaded) -> None:
    core, ids, turns = loaded.core(), prompt(2, 30), ((5, 9), (12, 20))
    always = Condition(terms=(Term("resid_post", 4),), threshold=-1.0, scope=GENERATED)
    got = ask(core, ids, turns, (), triggers=(Trigger("t", always, Flag()),))
    core.finish()
    assert got.answer.completion is not None
    assert got.answer.completion.receipt is not None
    (seen,) = got.answer.completion.receipt.triggers
    read = [*ids, *got.answer.ids[:-1]]
    inside = [at for at, token in enumerate(read) if counts(ids, turns, at, GENERATED) and token not in SPECIAL]
    assert (seen.tokens_evaluated, seen.tokens_on, seen.first_position) == (len(inside), len(inside), inside[0])


def test_a_row_without_turns_is_bit_identical_beside_one_that_has_them(loaded: Loaded) -> None:
    core, ids = loaded.core(reuse=False), prompt(3, 20)
    alone = ask(core, ids, (), ())
    core.finish()
    beside = [ask(core, ids, ((4, 9),), (Clamp("resid_post", 4, 9.0, scope=GENERATED),)), ask(core, ids, (), ())]
    core.finish()
    assert beside[1].answer.ids == alone.answer.ids
    assert torch.equal(*(torch.tensor(one.answer.ids) for one in (alone, beside[1])))
