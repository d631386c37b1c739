"""vLLM on the CPU as it comes, without our plugin. Nobody is steered.

Served: tokens come one by one, as from a server. Offline: all at the end. Both in a process of vLLM's own, which it
starts with the threads and libraries that it wants; within this one it was found to take ten times as long.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bench.work import MODEL, batch, tokens
from bench.worker import serve

KV_BYTES = 2**31
GIVEN: dict[str, Any] = {
    "max_model_len": 2304,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": KV_BYTES,
    "skip_tokenizer_init": True,
}


def sampling(new: int, **more: Any) -> Any:
    """Greedy, for exactly ``new`` tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, **more)


class Offline:
    """Everything at the end."""

    def __init__(self, **given: Any) -> None:
        from vllm import LLM

        self._llm = LLM(**GIVEN, **given)

    async def batch(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Tokens per second of all requests at once."""
        assert not any(edits), "nobody is steered here"
        asked: Any = [{"prompt_token_ids": one} for one in prompts]
        start = time.perf_counter()
        found = self._llm.generate(asked, sampling(new), use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(one.outputs[0].token_ids) == new for one in found), "every request gets all its tokens"
        return tokens(prompts, new) / seconds


class Served:
    """Tokens as they come."""

    def __init__(self, **given: Any) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**GIVEN, disable_log_stats=True, **given))
        self._names = itertools.count()

    async def batch(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Tokens per second of all requests at once."""
        assert not any(edits), "nobody is steered here"
        start = time.perf_counter()
        got = await asyncio.gather(*(self._one(one, new) for one in prompts))
        seconds = time.perf_counter() - start
        assert all(count == new for count in got), "every request gets all its tokens"
        return tokens(prompts, new) / seconds

    async def _one(self, prompt: list[int], new: int) -> int:
        from vllm.sampling_params import RequestOutputKind

        asked: Any = {"prompt_token_ids": prompt}
        wanted = sampling(new, output_kind=RequestOutputKind.DELTA)
        return sum(
            [len(one.outputs[0].token_ids) async for one in self._llm.generate(asked, wanted, str(next(self._names)))]
        )


async def warm(run: Callable[..., Awaitable[float]]) -> float:
    """Seconds until every kind of pass was met once."""
    start = time.perf_counter()
    for count in (1, 2, 32):
        await run(**batch(count, 4, count))
    return time.perf_counter() - start


async def main() -> None:
    """Serves the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--offline", action="store_true")
    args = parser.parse_args()
    kind = Offline if args.offline else Served
    plain = kind(model=str(args.folder / MODEL), dtype=args.dtype, enforce_eager=args.eager)
    await serve({"batch": plain.batch, "warm": lambda: warm(plain.batch)})


if __name__ == "__main__":
    asyncio.run(main())
