"""Comparisons on a real model, against Hugging Face's generation with a plain hook and the divergence in float64."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from scipy.special import rel_entr

from saeguard.requests import GenerateRequest
from saeguard.results import Completion
from saeguard.types import Clamp, Scale, Stop, Trigger
from saeguard_server.audit.chain import read_audit
from saeguard_server.audit.log import Audit
from saeguard_server.caller import LOCAL, Call
from saeguard_server.engine.protocol import Origin
from saeguard_server.engine.transformers import TransformersEngine, load_engine
from saeguard_server.errors import InvalidRequest
from saeguard_server.generation import (
    Comparison,
    Counterfactuals,
    Generation,
    RequestRecorder,
    all_chunks,
    first_divergence,
    measure_divergence,
    token_ids,
    without_policy,
)
from saeguard_server.observe import Metrics
from saeguard_server.settings import AuditSettings, LimitSettings
from support.alone import Alone
from support.engines import World, greedy, make_world, open_admission, prompt
from support.policy_shapes import when

SAE, NEW = "resid_post", 7
EDITS = (Clamp(SAE, 4, 9.0), Scale("mlp_out", 7, -3.0))


@dataclass
class Side:
    """An engine that compares."""

    world: World
    engine: TransformersEngine
    flow: Generation

    async def compare(self, request: GenerateRequest) -> Comparison:
        return await self.flow.compare(request, call())


def call() -> Call:
    return Call("test", time.monotonic() + 60.0, LOCAL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("gpt2", Path(tmp_path_factory.mktemp("gpt2")))


@pytest.fixture(scope="module")
def engine(world: World) -> TransformersEngine:
    return load_engine(world.settings(), Metrics(CollectorRegistry()))


@pytest.fixture
async def side(world: World, engine: TransformersEngine) -> AsyncIterator[Side]:
    engine.start()
    yield Side(world, engine, Generation(engine, engine.tokenizer, LimitSettings(), open_admission(engine)))
    engine.stop()


def ids(completion: Completion) -> tuple[int, ...]:
    return tuple(token.id for token in completion.tokens)


def wanted_kl(world: World, request: GenerateRequest, tokens: tuple[int, ...]) -> list[float]:
    """From the reference's steered log-probabilities, and one plain pass over the same tokens."""
    steered = Alone(world).answer(request).logprobs[: len(tokens)].double().numpy()
    whole_text = torch.tensor([[*request.input.ids, *tokens]])  # type: ignore[union-attr]
    with torch.no_grad():
        logits = world.model(whole_text).logits[0, -len(tokens) - 1 : -1]
    plain = logits.double().log_softmax(-1).numpy()
    return list(rel_entr(np.exp(steered), np.exp(plain)).sum(axis=-1))


async def test_both_answers_and_their_distance_are_the_references(side: Side) -> None:
    request = greedy(prompt(3, 8), NEW, interventions=EDITS)
    found = await side.compare(request)
    reference = Alone(side.world)
    steered, plain = reference.answer(request).tokens, reference.answer(replace(request, interventions=())).tokens
    assert list(ids(found.steered)) == steered
    assert list(ids(found.unsteered)) == plain
    assert found.first_divergence == first_divergence(steered, plain)
    assert steered != plain
    assert found.kl_nats == pytest.approx(wanted_kl(side.world, request, ids(found.steered)), abs=1e-4)
    assert max(found.kl_nats) > 0.01


async def test_nothing_done_is_nothing_changed(side: Side) -> None:
    found = await side.compare(greedy(prompt(3, 8), NEW))
    assert ids(found.steered) == ids(found.unsteered)
    assert (found.first_divergence, found.kl_nats) == (None, pytest.approx([0.0] * NEW, abs=1e-6))


async def test_many_at_once_are_as_one(side: Side) -> None:
    requests = [greedy(prompt(seed, 5 + seed), NEW, interventions=EDITS[: seed % 3]) for seed in range(4)]
    together = await asyncio.gather(*(side.compare(one) for one in requests))
    for request, found in zip(requests, together, strict=True):
        alone = await side.compare(request)
        assert ids(found.steered) == ids(alone.steered)
        assert found.kl_nats == pytest.approx(alone.kl_nats, abs=1e-5)


async def test_an_answer_that_a_trigger_ended_is_compared_up_to_there(side: Side) -> None:
    stop = Trigger("end", when(3, -1e9, SAE), Stop())
    found = await side.compare(greedy(prompt(3, 8), NEW, triggers=(stop,)))
    assert found.steered.finish_reason == "feature"
    assert (ids(found.steered), found.kl_nats, found.first_divergence) == ((), (), 0)


async def test_a_comparison_is_audited_as_one(side: Side, tmp_path: Path) -> None:
    audit = Audit.of(AuditSettings(folder=str(tmp_path)), Metrics(CollectorRegistry()))
    engine, recorder = side.engine, RequestRecorder(audit)
    flow = Generation(engine, engine.tokenizer, LimitSettings(), open_admission(engine), recorder=recorder)
    await flow.compare(greedy(prompt(3, 8), NEW, interventions=EDITS), call())
    audit.close()
    ((told, _),) = read_audit(tmp_path, None)
    assert (told["request_id"], told["is_comparison"], told["outcome"]) == ("test", True, "length")
    assert (told["generated_tokens"], len(told["edits"])) == (NEW, 2)


async def test_what_cannot_be_compared(side: Side) -> None:
    request = greedy(prompt(3, 8), NEW)
    sampling = replace(request.sampling, prompt_logprobs=True)
    with pytest.raises(InvalidRequest, match=r"^sampling\.prompt_logprobs"):
        await side.compare(replace(request, sampling=sampling))


async def test_a_counterfactual_is_the_answer_read_without_one_policy(side: Side) -> None:
    ready = await side.flow.compile(greedy(prompt(3, 8), NEW, interventions=EDITS), call())
    steering = ready.task.steering
    mine = replace(steering.edits[0], origin=Origin("calm", "r"))
    task = replace(ready.task, steering=replace(steering, edits=(mine, *steering.edits[1:])))
    answer = token_ids(await all_chunks(side.engine, task))
    metrics = Metrics(CollectorRegistry())
    measuring = Counterfactuals(side.engine, metrics)
    async with measuring.running():
        measuring.consider(task, answer, [("calm", 1.0), ("other", 1.0), ("calm", 0.0)])
        until = time.monotonic() + 20
        while not _count(metrics) and time.monotonic() < until:
            await asyncio.sleep(0.02)
    assert _count(metrics) == 1
    kl = await measure_divergence(side.engine, task, answer, without_policy(task.steering, "calm"))
    total = metrics.registry.get_sample_value("saeguard_policy_counterfactual_kl_nats_sum", {"policy": "calm"})
    assert total == pytest.approx(sum(kl) / len(kl), abs=1e-5)
    assert total > 0


def _count(metrics: Metrics) -> Any:
    name = "saeguard_policy_counterfactual_kl_nats_count"
    return metrics.registry.get_sample_value(name, {"policy": "calm"}) or 0
