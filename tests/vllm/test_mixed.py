"""Whatever company a request has, it is answered as if alone, which is told by plain transformers.

Prompts that begin alike, every kind of steering, parts of six tokens, too little memory, callers who leave.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from saeguard_sae.edits import Add, Cap, Clamp, Scale, Zero
from saeguard_server.interventions import Intervention, Scope
from saeguard_server.request import GenerationRequest, Sampling, TokenInput
from support.alone import Alone
from support.engines import Running, World, edit, prompt

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.filterwarnings("default")]

NEW = 45
LENGTHS = (60, 80)
STEERINGS: tuple[tuple[Intervention, ...], ...] = (
    (),
    (edit("resid_post", 4, Clamp(4.0)),),
    (edit("resid_post", 4, Clamp(4.0), Scope("prompt")), edit("attn_z", 2, Scale(-3.0), Scope("generated"))),
    (edit("mlp_out", 9, Add(3.0), Scope("generated")), edit("resid_post", 7, Zero(), Scope("generated"))),
    (edit("resid_post", 4, Clamp(4.0), Scope(include_special_tokens=True)), edit("attn_out", 3, Cap(0.1))),
    (edit("resid_pre", 4, Clamp(4.0), Scope(start=20)),),
)


def drawn(draw: random.Random) -> GenerationRequest:
    """Prompts of one length begin alike, as all of them do."""
    sampling = Sampling(max_new_tokens=draw.randint(35, NEW), temperature=0.0, logprobs=0, ignore_eos=True)
    tokens = tuple(prompt(11, draw.choice(LENGTHS)))
    return GenerationRequest(prompt=TokenInput(tokens), sampling=sampling, interventions=draw.choice(STEERINGS))


async def test_everybody_is_answered_as_if_alone(llama: World, one: Running) -> None:
    alone, metrics = Alone(llama, least=NEW), one.engine._metrics
    events = (metrics.preemptions, metrics.reused_tokens)
    before = [event._value.get() for event in events]

    draw = random.Random(20)
    # Three times the slots: who waits joins in the middle.
    crowd = [(drawn(draw), draw.random() < 0.2) for _ in range(24)]
    answers = await asyncio.gather(*(one.ask(request, stop_after=3 if leaves else None) for request, leaves in crowd))
    for (request, leaves), answer in zip(crowd, answers, strict=True):
        if not leaves:
            alone.check(request, answer)
    preempted, found = (event._value.get() - was for event, was in zip(events, before, strict=True))
    assert preempted > 0
    assert found > 0
    assert one.engine.queued() == 0
