"""nnsight: a traced ``generate`` that adds the edited features' difference to a layer of every request.

One request after the other, or all in one padded batch in which each sees its own rows.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import nnsight
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.work import LAYER, MODEL, PAD, SAE, tokens
from bench.worker import serve


class NnSight:
    """The benchmark's model, wrapped; the SAE's rows of the edited features only, in float32."""

    def __init__(self, folder: Path, dtype: str) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=getattr(torch, dtype))
        loaded.generation_config.eos_token_id = None
        tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
        self._model = nnsight.LanguageModel(loaded.eval().requires_grad_(False), tokenizer=tokenizer)
        self._sae = load_file(folder / SAE / "sae_weights.safetensors")

    def one_by_one(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Tokens per second, each request under its own edits."""
        start = time.perf_counter()
        for one, steer in zip(prompts, edits, strict=True):
            self._run([one], new, [steer])
        return tokens(prompts, new) / (time.perf_counter() - start)

    def padded(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Tokens per second, each request under its own edits."""
        start = time.perf_counter()
        self._run(prompts, new, edits)
        return tokens(prompts, new) / (time.perf_counter() - start)

    @torch.inference_mode()
    def _run(self, prompts: list[list[int]], new: int, edits: list[Any]) -> None:
        layer, given = self._model.model.layers[LAYER], []
        wanted: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with self._model.generate(pad_token_id=PAD, **wanted) as tracer:
            for one, delta in zip(prompts, [_delta(self._sae, steer) for steer in edits], strict=True):
                with tracer.invoke(torch.tensor([one])):
                    for _ in tracer.iter[:new]:
                        layer.output = layer.output + delta(layer.output)
                    given.append(tracer.result.save())
        assert len(given) == len(prompts), "every request is answered"
        assert all(one.shape[-1] >= new for one in given), "every request gets all its tokens"


def _delta(sae: dict[str, torch.Tensor], steer: list[Any]) -> Any:
    """x [..., width] -> what the edits of a JumpReLU SAE add to it."""
    at = torch.tensor([feature for _, feature, _ in steer])
    W_enc, b_enc, W_dec = sae["W_enc"][:, at], sae["b_enc"][at], sae["W_dec"][at]
    threshold, b_dec = sae["threshold"][at], sae["b_dec"]

    def delta(x: torch.Tensor) -> torch.Tensor:
        p = (x.float() - b_dec) @ W_enc + b_enc
        f = p.relu() * (p > threshold)
        by_kind = {"zero": lambda f, v: f * 0, "clamp": lambda f, v: f * 0 + v}
        by_kind |= {"scale": lambda f, v: f * v, "add": lambda f, v: f + v}
        wanted = [by_kind[kind](f[..., j], value) for j, (kind, _, value) in enumerate(steer)]
        return ((torch.stack(wanted, dim=-1) - f) @ W_dec).to(x.dtype)

    return delta


if __name__ == "__main__":
    sight = NnSight(Path(sys.argv[1]), sys.argv[2])
    asyncio.run(serve({"one_by_one": sight.one_by_one, "padded": sight.padded}))
