"""The ops inside vLLM's compiled graph: the same tokens and counts, and a cached graph of other sites is not taken."""

from __future__ import annotations

import asyncio

import pytest
import torch

from saeguard.types import Clamp
from saeguard_server.settings import VllmSettings
from support import reference, vllm
from support.engines import World, greedy, prompt
from support.models import BOS, EOS, PAD, SITES

pytestmark = [pytest.mark.asyncio, pytest.mark.filterwarnings("default")]


async def test_edits_at_every_site_equal_plain_hooks(llama: World) -> None:
    settings = vllm.served(llama, vllm=VllmSettings(eager=False))
    names = [one.name for one in settings.saes]
    with vllm.running(settings) as one:
        got = await asyncio.gather(
            one.ask(greedy(prompt(99, 30), 10)),
            *(
                one.ask(greedy(prompt(index, 20), 10, interventions=(Clamp(name, 3 + index, 4.0),)))
                for index, name in enumerate(names)
            ),
        )
    special = {BOS, EOS, PAD}
    assert got[0].ids == reference.generate(llama.model, prompt(99, 30), 10, [], special).tokens
    for index, name in enumerate(names):
        module, side = SITES["llama"][name]
        plain = reference.PlainEdit(llama.saes[name], module, side, 3 + index, lambda f: torch.full_like(f, 4.0))
        answer = got[index + 1]
        assert answer.ids == reference.generate(llama.model, prompt(index, 20), 10, [plain], special).tokens, name
        assert answer.completion is not None
        assert answer.completion.receipt is not None
        in_scope = sum(token not in special for token in [*prompt(index, 20), *answer.ids][:-1])
        assert answer.completion.receipt.interventions[0].tokens_eligible == in_scope
