"""Tokens per second: steered against unsteered, batched against one at a time, the engine against ``generate``.

A random Llama of GPT-2-small's size, prompts of 16 to 48 tokens, an SAE of 24,576 features in its middle layer. Every
side does the same work in every round, in turn, so that a busy machine hits them alike.

    make bench                      the default: 125M parameters, float32, 32 requests, 3 rounds
    make bench ARGS="--dtype bfloat16 --new 32"
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from transformers import LlamaConfig, LlamaForCausalLM

from bench.report import figure
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.edits import Add, Clamp, Scale, Zero
from saeguard_sae.table import FOREVER, Column, EditTable
from saeguard_server.engine.transformers import load_engine
from saeguard_server.observe.metrics import Metrics
from saeguard_server.request import FeatureRef, GenerationRequest, Intervention, Sampling, TokenInput
from saeguard_server.settings import EngineSettings, ModelSettings, SaeSettings, Settings
from support.engines import Running, prompt
from support.models import BOS, EOS, PAD, VOCAB, tokenizer
from support.saes import plain_sae, save_sae

SIZES = {"125m": (768, 12, 12, 3072), "tiny": (192, 6, 6, 512)}
EDITS_EACH = 8


@dataclass(frozen=True)
class Work:
    """What every side does."""

    prompts: list[list[int]]
    new: int

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return len(self.prompts) * self.new


def main() -> None:
    """Runs every side and prints the figures."""
    args = _arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        settings = _write(Path(folder), args)
        work = Work([prompt(index, 16 + (index * 13) % 33) for index in range(args.requests)], args.new)
        rounds = asyncio.run(_measure(settings, work, args))
    _print(rounds)
    _edit_cost()


async def _measure(settings: Settings, work: Work, args: argparse.Namespace) -> dict[str, list[float]]:
    engine = load_engine(settings, Metrics(CollectorRegistry()))
    engine.start()
    running, network = Running(engine, settings.limits), engine._core.model.network
    few = Work(work.prompts[:: max(1, args.requests // 4)], work.new)

    async def served(which: Work, steer: Callable[[int], tuple[Intervention, ...]]) -> float:
        start = time.perf_counter()
        asked = (running.ask(_request(one, which.new, steer(i))) for i, one in enumerate(which.prompts))
        await asyncio.gather(*asked)
        return which.tokens / (time.perf_counter() - start)

    async def one_by_one() -> float:
        start = time.perf_counter()
        for index, one in enumerate(few.prompts):
            await running.ask(_request(one, few.new, _different(index)))
        return few.tokens / (time.perf_counter() - start)

    sides: dict[str, Callable[[], Any]] = {
        "unsteered": lambda: served(work, lambda _: ()),
        "steered": lambda: served(work, _different),
        "same_edits": lambda: served(work, lambda _: _different(0)),
        "one_by_one": one_by_one,
        "generate_one_by_one": lambda: asyncio.to_thread(_sequential, network, few),
        "generate_padded": lambda: asyncio.to_thread(_padded, network, work),
    }
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        for name, side in sides.items():
            speed = await side()
            if turn:  # the first round warms up
                rounds[name].append(speed)
    engine.stop()
    return rounds


def _print(rounds: dict[str, list[float]]) -> None:
    def show(name: str, ours: str, theirs: str, target: str) -> None:
        figure(name, "tokens/s", rounds[ours], rounds[theirs], sides=(ours, theirs), target=target)

    show("steered against unsteered", "steered", "unsteered", ">= 0.95")
    show("different edits against the same edits", "steered", "same_edits", ">= 0.90")
    show("batched against one at a time", "steered", "one_by_one", "")
    show("steered against generate one at a time", "steered", "generate_one_by_one", ">= 24 (bfloat16)")
    show("steered against generate with padding, unsteered", "steered", "generate_padded", ">= 1.6")


def _edit_cost() -> None:
    """Milliseconds of one table step, with a dictionary of 4k features and of 128k."""
    times: dict[int, list[float]] = {4096: [], 131072: []}
    tables = {d_sae: _table(d_sae) for d_sae in times}
    x, positions = torch.randn(32, 1, 768), torch.zeros(32, 1, dtype=torch.int64)
    special = torch.zeros(32, 1, dtype=torch.bool)
    for _ in range(7):
        for d_sae, table in tables.items():
            start = time.perf_counter()
            for _ in range(50):
                table.apply(x, slice(0, 32), positions, special)
            times[d_sae].append((time.perf_counter() - start) * 20)
    figure("edit cost as the dictionary grows", "ms", times[131072], times[4096], sides=("128k", "4k"), target="<= 1.2")


def _table(d_sae: int) -> EditTable:
    plain = plain_sae("jumprelu", 768, d_sae, seed=5)
    from saeguard_sae.activations import JumpReLU

    w = plain.weights
    dictionary = Dictionary(w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], JumpReLU(w["threshold"]))
    table = EditTable(32, 768)
    for slot in range(32):
        clamp = Clamp(2.0).affine(1.0)
        table.write(slot, [Column(dictionary, slot * 8 + j, clamp, 0, FOREVER) for j in range(EDITS_EACH)])
    return table


def _different(index: int) -> tuple[Intervention, ...]:
    kinds = (Zero(), Clamp(1.0), Scale(0.5), Add(0.5))
    return tuple(
        Intervention(FeatureRef("mid", (index * 97 + j * 13) % 24576), kinds[j % 4]) for j in range(EDITS_EACH)
    )


def _request(ids: list[int], new: int, steer: tuple[Intervention, ...]) -> GenerationRequest:
    sampling = Sampling(max_new_tokens=new, temperature=0.0, ignore_eos=True)
    return GenerationRequest(prompt=TokenInput(tuple(ids)), sampling=sampling, interventions=steer)


@torch.inference_mode()
def _sequential(network: Any, work: Work) -> float:
    start = time.perf_counter()
    for one in work.prompts:
        ids = torch.tensor([one])
        network.generate(ids, attention_mask=torch.ones_like(ids), **_exactly(work.new))
    return work.tokens / (time.perf_counter() - start)


@torch.inference_mode()
def _padded(network: Any, work: Work) -> float:
    longest = max(map(len, work.prompts))
    ids = torch.tensor([[PAD] * (longest - len(one)) + one for one in work.prompts])
    start = time.perf_counter()
    network.generate(ids, attention_mask=(ids != PAD).long(), **_exactly(work.new))
    return work.tokens / (time.perf_counter() - start)


def _exactly(new: int) -> dict[str, Any]:
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": PAD}


def _write(folder: Path, args: argparse.Namespace) -> Settings:
    hidden, layers, heads, inner = SIZES[args.size]
    config = LlamaConfig(
        vocab_size=max(VOCAB, 8192),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    sae = plain_sae("jumprelu", hidden, 24576, seed=3)
    save_sae(sae, folder / "mid", f"blocks.{layers // 2}.hook_resid_post")
    return Settings(
        model=ModelSettings(path=str(folder / "model"), dtype=args.dtype),
        saes=(SaeSettings(name="mid", path=str(folder / "mid")),),
        engine=EngineSettings(max_slots=args.requests, max_context=256),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="125m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
