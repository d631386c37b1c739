"""Policies on a real model: an enforced rule does what the same edit in a request does, and a shadow nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from math import inf
from typing import Any, TypeAlias

import pytest
from prometheus_client import CollectorRegistry

from saeguard.catalog import Activation
from saeguard.results import InterventionReceipt, StoppedBy
from saeguard.types import Add, Cap, Clamp, Intervention, Scale, Stop, Trigger, Window
from saeguard_server.engine.transformers import TransformersEngine, load_engine
from saeguard_server.generation import Generation
from saeguard_server.observe import Metrics
from saeguard_server.policy.model import Policy, PolicyLimits, PolicyRevision
from saeguard_server.policy.snapshot import PoliciesInForce, build_snapshot
from saeguard_server.settings import LimitSettings
from support.engines import Answer, Running, greedy, make_world, open_admission, prompt
from support.policy_shapes import NOW, policy, rule, when

SAE, NEW = "resid_post", 6
Ask: TypeAlias = Callable[..., Awaitable[Answer]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    world = make_world("gpt2", tmp_path_factory.mktemp("gpt2"))
    return load_engine(world.settings(prefix_cache=False), Metrics(CollectorRegistry()))


@pytest.fixture
async def ask(engine: TransformersEngine) -> Any:
    """One greedy generation under some policies."""
    engine.start()
    policies = PoliciesInForce(inf)
    runs = Running(engine, LimitSettings())
    runs.flow = Generation(engine, engine.tokenizer, LimitSettings(), open_admission(engine), policies)

    async def run(*found: Policy, **more: Any) -> Answer:
        revision = PolicyRevision(number=1, policies=found, author="ada", time=NOW, reason="test")
        activation = Activation(number=1, revision=1, actor="ada", time=NOW, reason="test")
        policies.replace(build_snapshot(activation, revision, engine, NOW))
        policies.renew()
        return await runs.ask(greedy(prompt(3, 8), NEW, **more))

    yield run
    engine.stop()


def made(answer: Answer) -> list[InterventionReceipt]:
    assert answer.completion is not None
    return list(answer.completion.receipt.interventions) if answer.completion.receipt else []


STRONG: list[Intervention] = [Clamp(SAE, 4, 9.0), Scale(SAE, 4, -4.0), Add(SAE, 4, -6.0)]


@pytest.mark.parametrize("kind", STRONG, ids=str)
async def test_a_rule_does_what_a_request_would_and_a_shadow_nothing(ask: Ask, kind: Intervention) -> None:
    plain = await ask()
    asked = await ask(interventions=(kind,))
    enforced = await ask(policy("a", rule("r", kind)))
    shadow = await ask(policy("a", rule("r", kind), mode="shadow"))
    assert asked.tokens == enforced.tokens
    assert asked.tokens != plain.tokens == shadow.tokens
    (own,), (rules,), (shadows,) = made(asked), made(enforced), made(shadow)
    assert rules == replace(own, policy="a", rule="r")
    assert (shadows.policy, shadows.is_shadow, shadows.tokens_eligible) == ("a", True, own.tokens_eligible)
    assert shadows.tokens_edited > 0


async def test_a_tightened_rule_is_the_tighter_edit(ask: Ask) -> None:
    cap = policy("a", rule("less", Cap(SAE, 4, 0.5)))
    both = await ask(cap, interventions=(Cap(SAE, 4, 0.1),))
    alone = await ask(interventions=(Cap(SAE, 4, 0.1),))
    assert both.tokens == alone.tokens
    assert made(both) == [replace(made(alone)[0], policy="a", rule="less")]


async def test_a_requests_limit_is_not_a_rules_and_a_policys_is_a_requests(ask: Ask) -> None:
    limits = PolicyLimits(max_relative_edit=0.02, allowed_saes=(SAE,))
    clamp = policy("a", rule("r", Clamp(SAE, 4, 9.0)), limits=limits)
    rules, own = made(await ask(clamp, interventions=(Clamp(SAE, 5, 9.0),), max_relative_edit=0.01))
    assert (rules.tokens_capped, own.tokens_capped) == (0, own.tokens_edited)
    assert rules.mean_relative_edit > 0.01 >= own.mean_relative_edit - 1e-6
    (limited,) = made(await ask(policy("b", limits=limits), interventions=(Clamp(SAE, 5, 9.0),)))
    assert limited.tokens_capped == limited.tokens_edited > 0
    assert limited.mean_relative_edit == pytest.approx(0.02)


async def test_a_policys_triggers_and_conditions_do_what_a_requests_would(ask: Ask) -> None:
    always = when(5, -1.0, SAE)
    stop = Trigger("end", when(6, -1.0, SAE, window=Window("k_of_n", 9, 9)), Stop())
    rules = policy("a", rule("r", Clamp(SAE, 4, 9.0, when=always)), triggers=(stop,))
    enforced = await ask(rules)
    asked = await ask(interventions=(replace(Clamp(SAE, 4, 9.0), when=always),), triggers=(stop,))
    assert enforced.tokens == asked.tokens
    assert len(enforced.tokens) == 1
    done, other = enforced.completion, asked.completion
    assert done is not None
    assert other is not None
    assert (done.finish_reason, done.stopped_by) == ("feature", StoppedBy("a", "end"))
    assert (other.finish_reason, other.stopped_by) == ("feature", StoppedBy("", "end"))
    counted = await ask(replace(rules, mode="shadow"))
    assert len(counted.tokens) == NEW
    assert counted.completion is not None
    assert counted.completion.receipt is not None
    (seen,) = counted.completion.receipt.triggers
    assert (seen.policy, seen.name, seen.is_shadow, seen.first_position) == ("a", "end", True, 9)
