"""Rules are measured and made after the caller's own edits at their site: against plain hooks, whatever the company."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from saeguard.requests import GenerateRequest
from saeguard.types import (
    Add,
    Apply,
    Cap,
    Clamp,
    Condition,
    FeatureRef,
    Floor,
    Intervention,
    Scale,
    Scope,
    Stop,
    Term,
    Trigger,
    Zero,
)
from saeguard_server.engine.protocol import CompiledEdit, Origin
from saeguard_server.steering import CompiledTrigger, compile_edit, compile_trigger
from support.alone import NEAR, Alone
from support.engines import World, greedy, make_world, prompt
from support.stepping import Asked, Loaded, Stepped, policy_task

POINTS = ("resid_pre", "attn_out", "mlp_out", "resid_post")
ORIGIN = Origin("safety", "rule")
NEW = 8
KINDS: tuple[tuple[type[Any], tuple[Any, ...]], ...] = (
    (Zero, ()), (Clamp, (6.0,)), (Scale, (-2.0,)), (Add, (4.0,)), (Cap, (0.1,)), (Floor, (3.0,)),
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(world: World) -> Loaded:
    return Loaded(world)


def some_edits(draw: random.Random, count: int, features: range) -> list[Intervention]:
    """Of different features, at any point, each on some tokens."""
    edits = []
    for feature in draw.sample(features, count):
        kind, operands = draw.choice(KINDS)
        scope = draw.choice((Scope(), Scope(phase="prompt"), Scope(start=5), Scope(include_special_tokens=True)))
        edits.append(kind(draw.choice(POINTS), feature, *operands, scope=scope))
    return edits


def enforced(core: Stepped, edits: list[Intervention], **how: Any) -> list[CompiledEdit]:
    return [compile_edit(core.engine, edit, f"rules[{at}]", ORIGIN, **how) for at, edit in enumerate(edits)]


def guarded(core: Stepped, trigger: Trigger) -> CompiledTrigger:
    return compile_trigger(core.engine, trigger, "triggers[0]", Origin("safety", trigger.name))


def test_own_edits_come_first_then_rules(world: World, loaded: Loaded) -> None:
    """In one batch with who has rules alone, edits alone and neither; in chunks, from cached prefixes, interrupted."""
    draw, alone = random.Random(20), Alone(world)
    asked: list[tuple[GenerateRequest, list[Intervention]]] = []
    for number in range(10):
        own = some_edits(draw, draw.choice((0, 2, 5)), range(48)) if number else []
        rules = some_edits(draw, draw.choice((0, 2, 5)), range(48, 96)) if number else []
        asked.append((greedy(prompt(number % 3, 70), NEW, interventions=tuple(own)), rules))
    wanted = [alone.under(rules, request) for request, rules in asked]
    for prefill_tokens, blocks in ((7, 80), (400, 80), (60, 14)):
        core = loaded.core(prefill_tokens=prefill_tokens, blocks=blocks)
        for _ in range(2):
            running = [policy_task(core, request, enforced(core, rules), []) for request, rules in asked]
            core.finish()
            for answer, right in zip([one.answer for one in running], wanted, strict=True):
                assert answer.ids == right.tokens
                own_logprobs = [float(row[token]) for row, token in zip(right.logprobs, answer.ids, strict=True)]
                got = torch.tensor([token.logprob for token in answer.tokens])
                torch.testing.assert_close(got, torch.tensor(own_logprobs), rtol=0, atol=NEAR)
        assert core.is_empty()


def test_only_who_has_both_needs_a_second_table(loaded: Loaded) -> None:
    core = loaded.core(reuse=False)
    rules, own = [Zero("resid_post", 60)], (Add("resid_post", 3, 1.0),)
    for edits, interventions in ((rules, ()), ([], own), (rules, own)):
        running = policy_task(core, greedy(prompt(1, 9), 2, interventions=interventions), enforced(core, edits), [])
        core.step()
        tables = core.core.runner.tables._tables
        held = {stage for stages in tables.values() for stage, table in enumerate(stages) if table._sources}
        assert held == ({0, 1} if edits and interventions else {0})
        core.finish()
        assert running.answer.completion


def receipts(asked: Asked) -> list[Any]:
    completion = asked.answer.completion
    assert completion is not None
    assert completion.receipt is not None
    return list(completion.receipt.interventions)


def test_receipts_and_rules_tell_of_the_stream_that_the_caller_left(world: World, loaded: Loaded) -> None:
    """A parallel of the suppressed direction, added by the caller, is what the rule then meets."""
    sae, core = world.saes["resid_post"], loaded.core(reuse=False)
    reads = sae.weights["W_dec"] @ sae.weights["W_enc"][:, 7]
    reads[7] = 0
    rule, push = enforced(core, [Zero("resid_post", 7)]), Add("resid_post", int(reads.argmax()), 100.0)
    request = greedy(prompt(4, 20), 1)
    before, after = (
        policy_task(core, replace(request, interventions=interventions), rule, []) for interventions in ((), (push,))
    )
    core.finish()
    (plain,), (pushed, own) = receipts(before), receipts(after)
    assert (pushed.policy, own.policy) == ("safety", "")
    assert pushed.max_activation > plain.max_activation + 1
    assert pushed.tokens_edited == pushed.tokens_eligible > plain.tokens_edited


def test_what_policies_rest_on_is_read_after_the_callers_edits(loaded: Loaded) -> None:
    """And what the caller's own conditions rest on before them."""
    core, ref = loaded.core(reuse=False), FeatureRef("resid_post", 7)
    request = greedy(prompt(4, 20), 4)
    values = [one.values[0] for one in core.answer(replace(request, watch=(ref,))).readings]
    push = tuple(Add("resid_post", feature, 40.0) for feature in range(20, 30))
    pushed = receipts(policy_task_of(core, replace(request, interventions=push), [Scale("resid_post", 7, 1.0)]))[0]
    assert pushed.max_activation > max(values) + 0.1, "the push must move what is watched"
    above = Condition(
        terms=(Term("resid_post", 7),), threshold=(pushed.max_activation + max(values)) / 2, scope=Scope(end=20)
    )
    stop = Trigger("end", above, Stop())
    steered = replace(request, interventions=push)
    by_policy = policy_task(core, steered, [], [guarded(core, stop)])
    own = policy_task(core, steered, [], [compile_trigger(core.engine, stop, "t", Origin(rule="own"))])
    untouched = policy_task(core, request, [], [guarded(core, stop)])
    core.finish()
    reasons = [one.answer.completion and one.answer.completion.finish_reason for one in (by_policy, own, untouched)]
    assert reasons == ["feature", "length", "length"]
    # One condition, wanted by both: each decides it on its own stream.
    edit = Clamp("resid_post", 8, 5.0, when=above)
    mine = replace(request, interventions=(*push, replace(edit, feature=9)))
    rule, *_, last = receipts(policy_task_of(core, mine, [edit]))
    assert (rule.tokens_edited > 0, last.tokens_edited) == (True, 0)
    applied = Trigger("more", above, Apply((Clamp("resid_post", 8, 5.0),)))
    late = policy_task(core, mine, [], [guarded(core, applied)])
    core.finish()
    assert receipts(late)[-1].tokens_edited > 0


def policy_task_of(core: Stepped, request: GenerateRequest, rules: list[Intervention]) -> Asked:
    asked = policy_task(core, request, enforced(core, rules), [])
    core.finish()
    return asked
