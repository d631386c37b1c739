"""Whatever company a request has, it is answered as if alone, which is told by plain transformers.

Prompts that begin alike, every kind of steering, parts of six tokens, too little memory, callers who leave.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from saeguard.requests import GenerateRequest, Sampling, TokenInput
from saeguard.types import Add, Cap, Clamp, Intervention, Scale, Scope, Zero
from support.alone import Alone
from support.engines import Running, World, prompt

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.filterwarnings("default")]

NEW = 45
LENGTHS = (60, 80)
STEERINGS: tuple[tuple[Intervention, ...], ...] = (
    (),
    (Clamp("resid_post", 4, 4.0),),
    (
        Clamp("resid_post", 4, 4.0, scope=Scope(phase="prompt")),
        Scale("attn_z", 2, -3.0, scope=Scope(phase="generated")),
    ),
    (Add("mlp_out", 9, 3.0, scope=Scope(phase="generated")), Zero("resid_post", 7, scope=Scope(phase="generated"))),
    (Clamp("resid_post", 4, 4.0, scope=Scope(include_special_tokens=True)), Cap("attn_out", 3, 0.1)),
    (Clamp("resid_pre", 4, 4.0, scope=Scope(start=20)),),
)


def drawn(draw: random.Random) -> GenerateRequest:
    """Prompts of one length begin alike, as all of them do."""
    sampling = Sampling(max_new_tokens=draw.randint(35, NEW), temperature=0.0, logprobs=0, ignore_eos=True)
    tokens = tuple(prompt(11, draw.choice(LENGTHS)))
    return GenerateRequest(input=TokenInput(tokens), sampling=sampling, interventions=draw.choice(STEERINGS))


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
