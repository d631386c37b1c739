"""Where a generation of vLLM's engine ends: at a stop string, at the end token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from saeguard.requests import GenerateRequest, Sampling, TokenInput
from saeguard.types import Clamp
from support.engines import Running, World
from support.models import BOS, EOS
from support.vllm import SPECIAL, receipt

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.filterwarnings("default")]


async def test_stop_strings_end_the_text_and_the_counts_where_they_are(llama: World, one: Running) -> None:
    steer = (Clamp("resid_post", 4, 4.0),)
    sampling = Sampling(max_new_tokens=60, temperature=0.0, ignore_eos=True)
    request = GenerateRequest(input="Once upon a time", sampling=sampling, interventions=steer)
    free = await one.ask(request)
    stop = free.text[7:9]
    cut = free.text.index(stop)
    got = await one.ask(stopping(request, stop))
    assert got.text == free.text[:cut]
    assert got.completion is not None
    assert (got.completion.finish_reason, got.completion.stop_string) == ("stop", stop)
    assert got.ids == free.ids[: len(got.ids)]
    in_scope = got.completion.usage.prompt_tokens - 1 + sum(token not in SPECIAL for token in got.ids[:-1])
    assert receipt(got).interventions[0].tokens_eligible == in_scope


def stopping(request: GenerateRequest, stop: str) -> GenerateRequest:
    return replace(request, sampling=replace(request.sampling, stop=(stop,)))


async def test_the_end_token_ends_and_is_no_text(llama: World, one: Running) -> None:
    # The reference goes on past it: where it would come is found by asking for log-probabilities.
    request = GenerateRequest(
        input=TokenInput((BOS, 5, 6)),
        sampling=Sampling(max_new_tokens=120, temperature=1.5, seed=3),
    )
    got = await one.ask(request)
    again = await one.ask(request)
    assert got.ids == again.ids
    assert got.completion is not None
    if EOS in got.ids:
        assert got.ids.index(EOS) == len(got.ids) - 1
        assert got.completion.finish_reason == "stop"
    else:
        assert got.completion.finish_reason == "length"
