"""The product's promises, through the real client and socket, against plain ``generate`` with a plain hook."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from saeguard_client import Add, AsyncClient, Cap, Clamp, Completion, Floor, Intervention, Scale, Scope, Zero
from saeguard_server.app import App
from support import reference
from support.engines import D_SAE, World, make_world, prompt
from support.models import BOS, CONFIGS, EOS, PAD, SITES
from support.served import ENGINE, idle, serving

SPECIAL = {BOS, EOS, PAD}
NEW = 12

# Each kind as the client names it, and as a formula.
KINDS: list[tuple[Any, Any]] = [
    (lambda sae, j, scope: Zero(sae, j, scope=scope), lambda f: f * 0),
    (lambda sae, j, scope: Clamp(sae, j, 3.5, scope=scope), lambda f: torch.full_like(f, 3.5)),
    (lambda sae, j, scope: Scale(sae, j, -2.0, scope=scope), lambda f: -2 * f),
    (lambda sae, j, scope: Add(sae, j, 1.5, scope=scope), lambda f: f + 1.5),
    (lambda sae, j, scope: Cap(sae, j, 0.2, scope=scope), lambda f: f.clamp_max(0.2)),
    (lambda sae, j, scope: Floor(sae, j, 1.0, scope=scope), lambda f: f.clamp_min(1.0)),
]


@dataclass
class Case:
    """One request, as the client sends it and as the reference runs it."""

    prompt: list[int]
    steer: list[Intervention]
    plain: list[reference.PlainEdit]
    stop_after: int | None


def make_case(world: World, index: int) -> Case:
    """Zero to five different edits, at several sites, in several scopes; every fifth request is cancelled half-way."""
    chosen = random.Random(f"{world.model_type}-{index}")
    ids = prompt(index, 3 + (index * 7) % 40)
    steer: list[Intervention] = []
    plain: list[reference.PlainEdit] = []
    targets = [(sae, feature) for sae in world.saes for feature in range(D_SAE)]
    for sae, feature in chosen.sample(targets, index % 6):
        make, change = chosen.choice(KINDS)
        phase = chosen.choice(["all", "all", "prompt", "generated"])
        length = len(ids)
        applies = {
            "all": lambda position, token: True,
            "prompt": lambda position, token, length=length: position < length,
            "generated": lambda position, token, length=length: position >= length - 1,
        }[phase]
        steer.append(make(sae, feature, Scope(phase=phase)))
        plain.append(reference.PlainEdit(world.saes[sae], *SITES[world.model_type][sae], feature, change, applies))
    return Case(ids, steer, plain, 4 if index % 5 == 4 else None)


async def ask(client: AsyncClient, case: Case) -> tuple[list[int], list[float], Completion | None]:
    ids: list[int] = []
    logprobs: list[float] = []
    done = None
    stream = client.generate_stream(
        case.prompt, steer=case.steer, max_new_tokens=NEW, temperature=0.0, logprobs=0, ignore_eos=True
    )
    async for chunk in stream:
        ids += [token.id for token in chunk.tokens]
        logprobs += [token.logprob for token in chunk.tokens if token.logprob is not None]
        done = chunk.completion or done
        if case.stop_after is not None and len(ids) >= case.stop_after:
            break
    await stream.aclose()
    return ids, logprobs, done


@pytest.mark.parametrize("served", sorted(CONFIGS), indirect=True)
@pytest.mark.asyncio(loop_scope="session")
async def test_thirty_two_requests_at_once_equal_one_at_a_time(served: Any) -> None:
    await _prove(served.world, served.app)


@pytest.mark.skipif(ENGINE != "transformers", reason="another engine is asked for")
async def test_the_same_with_the_engine_in_a_process_of_its_own(tmp_path: Path) -> None:
    world = make_world("llama", tmp_path)
    async with serving(world, max_slots=16, process=True) as app:
        await _prove(world, app)


async def _prove(world: World, app: App) -> None:
    cases = [make_case(world, index) for index in range(32)]
    async with AsyncClient(f"127.0.0.1:{app.port}") as client:

        async def joining(index: int) -> Any:
            await asyncio.sleep(0.003 * (index % 11))
            return await ask(client, cases[index])

        answers = await asyncio.gather(*(joining(index) for index in range(32)))
        await idle(app)
    for case, (ids, logprobs, done) in zip(cases, answers, strict=True):
        wanted = reference.generate(world.model, case.prompt, NEW, case.plain, SPECIAL)
        assert ids == wanted.tokens[: len(ids)]
        own = wanted.logprobs[range(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(logprobs), own, rtol=0, atol=1e-4)
        if case.stop_after is None:
            assert len(ids) == NEW
            _check_receipt(case, ids, done)


def _check_receipt(case: Case, ids: list[int], done: Completion | None) -> None:
    assert done is not None
    if not case.steer:
        assert done.receipt is None
        return
    assert done.receipt is not None
    read = [*case.prompt, *ids][:-1]
    for plain, entry in zip(case.plain, done.receipt.interventions, strict=True):
        ends_prompt = len(case.prompt) - 1
        in_scope = sum(
            plain.applies(at, token) and (token not in SPECIAL or 0 < at == ends_prompt)
            for at, token in enumerate(read)
        )
        assert (entry.feature, entry.tokens_eligible) == (plain.feature, in_scope)


def test_the_reference_itself_is_steered(tmp_path: Path) -> None:
    """The proof would prove nothing if the edits changed nothing."""
    world = make_world("llama", tmp_path)
    changed = 0
    for index in range(32):
        case = make_case(world, index)
        steered = reference.generate(world.model, case.prompt, NEW, case.plain, SPECIAL)
        plain = reference.generate(world.model, case.prompt, NEW, [], SPECIAL)
        changed += steered.tokens != plain.tokens
    assert changed > 12
