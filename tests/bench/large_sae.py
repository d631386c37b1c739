"""SAEs of the sizes people have: time and memory to load one, and what edits and activations of one cost while served.

Loading: 16,384 features of a 2,304-wide stream in SAELens' format, in a process of its own. Serving: a random two-layer
Llama, 4,096 wide, with an SAE of 65,536 features of which about 100 fire on a token; each side in turn.

    make bench-large
    make bench-large ARGS="--d-sae 16384 --d-in 1024"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.report import figure
from saeguard.requests import ActivationRequest, GenerateRequest, Sampling, TokenInput, TopKSelection
from saeguard.types import Clamp, Scale, Zero
from saeguard_server.caller import Call
from saeguard_server.engine.transformers import load_engine
from saeguard_server.generation import ReadActivations
from saeguard_server.observe import Metrics
from saeguard_server.settings import CheckSettings, EngineSettings, ModelSettings, ServedSaeSettings, Settings
from support.engines import Running, open_admission, prompt
from support.models import VOCAB, tokenizer

ACTIVE = 100
POSITIVE = 0.033
"""Share of features above zero before the k largest are chosen, as in Llama Scope's layer 15."""
EDITS_EACH = 8
MIB = 2**20
LOAD = """
import json, sys, time
from pathlib import Path
from saeguard_sae.loading import open_sae

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

before, started = memory("VmRSS"), time.perf_counter()
weights = open_sae("one", Path(sys.argv[1])).found.dictionary.tensors().values()
seconds = time.perf_counter() - started
size = sum(one.numel() * one.element_size() for one in weights)
print(json.dumps({"seconds": seconds, "peak": memory("VmHWM") - before, "size": size}))
"""


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        load(Path(folder), args.rounds)
        asyncio.run(serve(Path(folder), args))


def load(folder: Path, rounds: int) -> None:
    """Time and memory of loading alone, against the aims: 2 seconds, 1.2 times the size in memory."""
    write_sae(folder / "load", 2304, 16384, "jumprelu", threshold=2.5)
    command = [sys.executable, "-c", LOAD, str(folder / "load")]
    found = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(rounds)
    ]
    seconds, peaks = [one["seconds"] for one in found], [one["peak"] / MIB for one in found]
    sizes = [one["size"] / MIB for one in found]
    figure("load 16,384 x 2,304", "s", seconds, [2.0], sides=("load", "aim"), target="<= 1")
    figure("peak memory of loading it", "MiB", peaks, sizes, sides=("peak", "size"), target="<= 1.2")


async def serve(folder: Path, args: argparse.Namespace) -> None:
    """Tokens per second with and without edits of either kind of SAE, and activations against the bare product."""
    settings = write_world(folder, args)
    engine = load_engine(settings, Metrics(CollectorRegistry()))
    engine.start()
    running = Running(engine, settings.limits)
    reader = ReadActivations(engine, engine.tokenizer, settings.limits, open_admission(engine))
    prompts = [prompt(index, 16) for index in range(args.requests)]

    async def generate(sae: str | None) -> float:
        start = time.perf_counter()
        await asyncio.gather(
            *(running.ask(request(one, args.new, sae, index, args.d_sae)) for index, one in enumerate(prompts))
        )
        return args.requests * args.new / (time.perf_counter() - start)

    long, W_enc = prompt(99, 128), engine.saes["jumprelu"].dictionary.W_enc  # type: ignore[union-attr]

    async def activations(saes: tuple[str, ...]) -> float:
        start = time.perf_counter()
        asked = ActivationRequest(inputs=(TokenInput(tuple(long)),), saes=saes, selection=TopKSelection(16))
        async for _ in reader.stream(asked, Call("bench", time.monotonic() + 300)):
            pass
        return (time.perf_counter() - start) * 1000

    sides: dict[str, Callable[[], Any]] = {
        "unsteered": lambda: generate(None),
        "jumprelu": lambda: generate("jumprelu"),
        "topk": lambda: generate("topk"),
        "top16": lambda: activations(("jumprelu",)),
        "product": lambda: asyncio.to_thread(product, torch.randn(len(long), args.d_in), W_enc),
    }
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        for name, side in sides.items():
            value = await side()
            if turn:  # the first round warms up
                rounds[name].append(value)
    engine.stop()
    for name in ("jumprelu", "topk"):
        figure(
            f"{args.d_sae} features, {name}, {EDITS_EACH} edits each", "tokens/s", rounds[name], rounds["unsteered"],
            sides=("steered", "unsteered"), target=">= 0.95",
        )  # fmt: skip
    figure(
        "top 16 of every token, with the model's own pass", "ms", rounds["top16"], rounds["product"],
        sides=("request", "product"), target="",
    )  # fmt: skip
    size = sum(one.numel() * one.element_size() for one in engine.saes["topk"].dictionary.tensors().values()) / MIB
    figure("memory of the server at its peak", "MiB", [peak()], [size], sides=("peak", "one_sae"), target="")


@torch.inference_mode()
def product(x: Tensor, W_enc: Tensor) -> float:
    """Milliseconds of the bare encoder product."""
    start = time.perf_counter()
    x @ W_enc
    return (time.perf_counter() - start) * 1000


def peak() -> float:
    """MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def request(ids: list[int], new: int, sae: str | None, index: int, d_sae: int) -> GenerateRequest:
    """A greedy request; with an SAE's name, under eight edits of its own."""
    kinds = (Zero("mid", 2), Clamp("mid", 2, 1.0), Scale("mid", 2, 0.5))
    steer = tuple(
        replace(kinds[j % 3], sae=sae, feature=(index * 997 + j * 131) % d_sae)
        for j in range(EDITS_EACH if sae else 0)
        if sae
    )
    sampling = Sampling(max_new_tokens=new, temperature=0.0, ignore_eos=True)
    return GenerateRequest(input=TokenInput(tuple(ids)), sampling=sampling, interventions=steer)


def write_world(folder: Path, args: argparse.Namespace) -> Settings:
    """The model, and the same dictionary as JumpReLU and as TopKSelection."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=args.d_in, num_hidden_layers=2, num_attention_heads=args.d_in // 128,
        intermediate_size=args.d_in * 11 // 4, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    W_dec = decoder(args.d_in, args.d_sae)
    with torch.inference_mode():
        x = model.model(torch.tensor([prompt(5, 64)]), output_hidden_states=True).hidden_states[1][0, 1:]
        ranked = (x @ W_dec.T).sort(dim=-1, descending=True).values.mean(dim=0)
    del model
    write_sae(folder / "jumprelu", args.d_in, args.d_sae, "jumprelu", threshold=float(ranked[ACTIVE]))
    write_sae(folder / "topk", args.d_in, args.d_sae, "topk", bias=-float(ranked[int(POSITIVE * args.d_sae)]))
    saes = tuple(ServedSaeSettings(name=kind, path=str(folder / kind)) for kind in ("jumprelu", "topk"))
    return Settings(
        model=ModelSettings(path=str(folder / "model")),
        saes=saes,
        check=CheckSettings(enabled=False),
        engine=EngineSettings(max_slots=args.requests, max_context=256),
    )


def decoder(d_in: int, d_sae: int) -> Tensor:
    """Random unit rows [d_sae, d_in]."""
    rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(7))
    return torch.nn.functional.normalize(rows, dim=1)


def write_sae(path: Path, d_in: int, d_sae: int, kind: str, *, threshold: float = 0.0, bias: float = 0.0) -> None:
    """Tied weights; features fire above the threshold, or the largest do."""
    path.mkdir(parents=True)
    W_dec = decoder(d_in, d_sae)
    tensors = {
        "W_enc": W_dec.T.contiguous(),
        "W_dec": W_dec,
        "b_enc": torch.full((d_sae,), bias),
        "b_dec": torch.zeros(d_in),
    }
    if kind == "jumprelu":
        tensors["threshold"] = torch.full((d_sae,), threshold)
    save_file(tensors, path / "sae_weights.safetensors")
    config: dict[str, Any] = {
        "architecture": kind, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "random", "hook_name": "blocks.0.hook_resid_post"},
    }  # fmt: skip
    (path / "cfg.json").write_text(json.dumps(config | ({"k": ACTIVE} if kind == "topk" else {})))


if __name__ == "__main__":
    main()
