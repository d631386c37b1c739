"""On a CUDA device: the same steered tokens as on the CPU, and the same bit-identity of idle rows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
import torch

from saeguard.types import Clamp, Scale, Zero
from saeguard_sae.edit_table import FOREVER, EditColumn, EditTable
from saeguard_sae.edits import Affine
from support.engines import Answer, World, greedy, make_world, prompt, running
from support.tables import edited

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


async def answers(world: World, device: str) -> list[Answer]:
    settings = world.settings()
    settings = msgspec.structs.replace(settings, model=msgspec.structs.replace(settings.model, device=device))
    steer = (Clamp("resid_post", 4, 4.0), Scale("mlp_out", 9, -2.0), Zero("attn_z", 3))
    with running(settings) as one:
        asked = (one.ask(greedy(prompt(i, 5 + i), 12, interventions=steer[: i % 4])) for i in range(16))
        return list(await asyncio.gather(*asked))


async def test_the_same_tokens_as_on_the_cpu(tmp_path: Path) -> None:
    world = make_world("llama", tmp_path)
    on_cpu, on_gpu = await answers(world, "cpu"), await answers(world, "cuda:0")
    assert [one.ids for one in on_gpu] == [one.ids for one in on_cpu]


def test_idle_rows_are_bit_identical(tmp_path: Path) -> None:
    from saeguard_sae.loading import load_sae

    make_world("llama", tmp_path)
    dictionary = load_sae("one", tmp_path / "resid_post").dictionary.to("cuda:0")
    table = EditTable(4, dictionary.d_in, "cuda:0")
    table.write(2, [EditColumn(dictionary, 3, Affine(alpha=0.0, beta=5.0), 0, FOREVER)])
    x = torch.randn(4, 3, dictionary.d_in, device="cuda:0")
    out = edited(table, x)
    others = [0, 1, 3]
    assert torch.equal(out[others], x[others])
    assert not torch.equal(out[2], x[2])
