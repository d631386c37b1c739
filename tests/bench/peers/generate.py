"""transformers' ``generate``: one request after the other, and all at once with padding. Nobody is steered."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.work import MODEL, PAD, tokens
from bench.worker import serve


class Generate:
    """The model as transformers runs it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=getattr(torch, dtype))
        self._model = loaded.eval()
        self._model.generation_config.eos_token_id = None

    def one_by_one(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Tokens per second."""
        assert not any(edits), "nobody is steered here"
        start = time.perf_counter()
        for one in prompts:
            self._run([one], new)
        return tokens(prompts, new) / (time.perf_counter() - start)

    def padded(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Tokens per second."""
        assert not any(edits), "nobody is steered here"
        start = time.perf_counter()
        self._run(prompts, new)
        return tokens(prompts, new) / (time.perf_counter() - start)

    @torch.inference_mode()
    def _run(self, prompts: list[list[int]], new: int) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
        out = self._model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=PAD
        )
        assert out.shape[1] == longest + new, "every request gets all its tokens"


if __name__ == "__main__":
    generate = Generate(Path(sys.argv[1]), sys.argv[2])
    asyncio.run(serve({"one_by_one": generate.one_by_one, "padded": generate.padded}))
