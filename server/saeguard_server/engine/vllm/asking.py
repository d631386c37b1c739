"""A task in vLLM's terms: the arguments of its sampling parameters and its prompt."""

from __future__ import annotations

import hashlib
from typing import Any

from saeguard_server.engine.protocol import GenerateTask, InspectTask, Steering
from saeguard_server.engine.vllm.orders import KEY, may_reuse
from saeguard_server.errors import InvalidRequest

COLDEST, HOTTEST = 0.01, 2.0
"""vLLM refuses what is hotter, and takes what is colder as this."""


def sampling(task: GenerateTask, order: bytes | None, eos_ids: frozenset[int]) -> dict[str, Any]:
    """Arguments for ``SamplingParams``.

    Raises:
        InvalidRequest: a temperature that vLLM does not know.
    """
    asked = task.sampling
    if asked.temperature and not COLDEST <= asked.temperature <= HOTTEST:
        limits = f"must be 0 (greedy) or {COLDEST:g} to {HOTTEST:g} with the vllm engine"
        raise InvalidRequest("sampling.temperature", f"{limits}, got {asked.temperature:g}")
    # A steered request's token has a log-probability whoever asked: it tells whether the logits were finite.
    watched = 0 if order is not None and asked.logprobs is None else asked.logprobs
    return _common(task, order) | {
        "max_tokens": task.max_new_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty,
        "seed": task.seed,
        "ignore_eos": asked.ignore_eos,
        "stop_token_ids": [] if asked.ignore_eos else sorted(eos_ids),
        "logprobs": watched,
        "prompt_logprobs": 0 if asked.prompt_logprobs else None,
    }


def reading(task: InspectTask, order: bytes | None) -> dict[str, Any]:
    """Arguments for ``SamplingParams`` of a request that only has its prompt read: vLLM must sample one token."""
    return _common(task, order) | {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True}


def prompt(task: GenerateTask | InspectTask) -> dict[str, Any]:
    """vLLM's prompt: KV is shared among those who are steered alike only."""
    given: dict[str, Any] = {"prompt_token_ids": list(task.tokens)}
    return given | {"cache_salt": _salt(task.steering)} if task.steering.digest else given


def _salt(steering: Steering) -> str:
    """Of its positions too, which the digest leaves out: "generated" begins elsewhere after another prompt."""
    return hashlib.blake2b(repr(steering).encode(), digest_size=16).hexdigest()


def _common(task: GenerateTask | InspectTask, order: bytes | None) -> dict[str, Any]:
    ordered = {} if order is None else {"extra_args": {KEY: order}}
    return {
        "detokenize": False,
        # What is not read again is neither counted nor watched.
        "skip_reading_prefix_cache": not may_reuse(task),
        **ordered,
    }
