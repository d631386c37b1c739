"""transformers' own continuous batching. Nobody is steered."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from bench.work import MODEL, PAD, tokens
from bench.worker import serve

WAIT_S = 240.0


class Continuous:
    """A running manager; its settings are those that were found fastest for this work."""

    def __init__(self, folder: Path, dtype: str) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=getattr(torch, dtype))
        wanted = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=PAD)
        memory = ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=512, page_size=32)
        self._manager = model.eval().init_continuous_batching(
            generation_config=wanted, continuous_batching_config=memory
        )
        self._manager.start()

    def batch(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Tokens per second of all requests at once.

        Raises:
            RuntimeError: the manager gave fewer tokens, or none in time.
        """
        assert not any(edits), "nobody is steered here"
        start = time.perf_counter()
        for one in prompts:
            self._manager.add_request(one, max_new_tokens=new)
        given = [self._next() for _ in prompts]
        seconds = time.perf_counter() - start
        if any(count != new for count in given):
            raise RuntimeError(f"a request got {min(given)} tokens, not {new}")
        return tokens(prompts, new) / seconds

    def _next(self) -> int:
        """Tokens of the next request that is over."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            found = self._manager.get_result(timeout=1)
            if found is not None and found.is_finished():
                return len(found.generated_tokens)
        raise RuntimeError(f"no request was finished within {WAIT_S:.0f} s")


if __name__ == "__main__":
    asyncio.run(serve({"batch": Continuous(Path(sys.argv[1]), sys.argv[2]).batch}))
