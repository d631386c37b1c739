"""Steered logits and activations equal those of SAELens' HookedSAETransformer on the same model."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeguard_client import Add, AsyncClient, Clamp, Scale, Zero
from saeguard_server.app import App
from saeguard_server.settings import CheckSettings, ModelSettings, ServedSaeSettings, ServerSettings, Settings
from support.models import tokenizer


@dataclass(frozen=True)
class World:
    """One of the reference's models with its SAEs."""

    tags: tuple[str, ...]
    settings: Settings


TAGS = {
    "hf_llama": (
        "llama_std",
        "llama_jump_ln",
        "llama_topk_rescale",
        "llama_gated_resid_pre",
        "llama_mlp_out",
        "llama_hook_z",
        "llama_transcoder",
    ),
    # Made on a model that TransformerLens had processed: the stream centred, value biases folded.
    "hf_gpt2": ("gpt2_centered_res_jb_style", "gpt2_hook_z_processed"),
}
# An edit leaves the reconstruction error alone, so these have no counterpart here: the reconstruction in
# place of the activation.
REPLACED = ("replace", "replace_ablate_j", "replace_exclude_tok1")


def edits(tag: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The reference's interventions in our words."""
    j, k = facts["j"], facts["k"]
    found = {
        "clean": [],
        "error_noop": [Scale(tag, j, 1.0)],
        "err_ablate_j": [Zero(tag, j)],
        "err_clamp_j": [Clamp(tag, j, facts["clamp_j"])],
        "err_clamp_k": [Clamp(tag, k, facts["clamp_k"])],
        "err_scale_j": [Scale(tag, j, facts["scale_j"])],
        "err_add_k": [Add(tag, k, facts["add_k"])],
    }
    if facts["hook"] == facts["hook_out"] and tag not in ("llama_jump_ln", "llama_topk_rescale"):
        # A decoder row added as it is: one unit of the feature, unless that is the token's deviation or the row's norm.
        found["steer_add_k"] = [Add(tag, k, facts["steer_add_k"])]
    return found


@pytest.fixture(scope="module", params=sorted(TAGS))
def world(request: pytest.FixtureRequest, reference_saes: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("model")
    shutil.copytree(reference_saes / "e2e_interventions" / request.param, path, dirs_exist_ok=True)
    tokenizer().save_pretrained(path)
    tags = TAGS[request.param]
    processing = "transformer_lens" if request.param == "hf_gpt2" else None
    saes = tuple(
        ServedSaeSettings(name=tag, path=str(reference_saes / "e2e_interventions" / tag), processing=processing)
        for tag in tags
    )
    server = ServerSettings(listen="127.0.0.1:0", metrics_listen="", log_level="error")
    check = CheckSettings(enabled=False)  # the model has fewer ids than the tokenizer
    return World(tags, Settings(model=ModelSettings(path=str(path)), saes=saes, check=check, server=server))


async def test_steered_logits_equal(world: World, reference_saes: Path) -> None:
    folder = reference_saes / "e2e_interventions"
    reference, facts = np.load(folder / "ref.npz"), json.loads((folder / "case.json").read_text())["cases"]
    tokens = reference["tokens"]
    async with App.build(world.settings) as app, AsyncClient(f"127.0.0.1:{app.port}") as client:

        async def check(tag: str, name: str, steer: Any, row: int) -> None:
            ids = tokens[row].tolist()
            got = await client.generate(ids, steer=steer, max_new_tokens=1, prompt_logprobs=True, logprobs=20)
            wanted = torch.from_numpy(reference[f"{tag}__{name}"][row]).log_softmax(-1)
            scored = wanted[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(list(got.prompt_logprobs)), scored, rtol=0, atol=1e-4)
            top = torch.tensor([one.logprob for one in got.tokens[0].top_logprobs])
            torch.testing.assert_close(top, wanted[-1].topk(20).values, rtol=0, atol=1e-4)

        every = [(tag, *one, row) for tag in world.tags for one in edits(tag, facts[tag]).items() for row in range(2)]
        await asyncio.gather(*(check(*one) for one in every))
    named = {name.removeprefix(f"{world.tags[0]}__") for name in reference.files if name.startswith(world.tags[0])}
    assert named - {"acts"} == {*edits(world.tags[0], facts[world.tags[0]]), *REPLACED}


async def test_activations_equal(world: World, reference_saes: Path) -> None:
    reference = np.load(reference_saes / "e2e_interventions" / "ref.npz")
    tokens = reference["tokens"]
    async with App.build(world.settings) as app, AsyncClient(f"127.0.0.1:{app.port}") as client:
        found = await client.activations([row.tolist() for row in tokens], world.tags, threshold=0.0)
    assert len(found) == 2 * len(world.tags)
    for one in found:
        wanted = reference[f"{one.sae}__acts"][one.input]
        scale = np.maximum(1.0, np.abs(wanted).max(axis=-1, keepdims=True))
        assert np.max(np.abs(one.to_dense(256) - wanted) / scale) <= 2e-5
