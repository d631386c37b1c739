"""Whose tokens a forward pass of vLLM's model runner reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """A request's tokens in a pass: rows ``[first, first + length)``, at positions from ``start`` on."""

    request: str
    start: int
    first: int
    length: int


class UnknownRunner(RuntimeError):
    """A model runner whose batch cannot be read."""


def check_runner(runner: Any) -> None:
    """Refuses what ``parts`` does not know.

    Raises:
        UnknownRunner: says what to set.
    """
    if not (hasattr(runner, "input_batch") and hasattr(runner, "requests")):
        raise UnknownRunner(
            f"vLLM's {type(runner).__module__} is not supported; set VLLM_USE_V2_MODEL_RUNNER=0 in the environment"
        )


def parts(runner: Any) -> list[Part]:
    """The parts of the pass that the runner is about to make; none where it only measures or compiles."""
    batch = runner.input_batch
    count = batch.num_reqs
    if not count or not _is_real():
        return []
    bounds = pairwise(runner.query_start_loc.np[: count + 1].tolist())
    starts = batch.num_computed_tokens_cpu[:count].tolist()
    return [
        Part(request, start, first, last - first)
        for request, start, (first, last) in zip(batch.req_ids[:count], starts, bounds, strict=True)
    ]


def order_of(runner: Any, request: str, key: str) -> bytes | None:
    """What a request says under ``key`` of its extra arguments."""
    params = runner.requests[request].sampling_params
    given = params.extra_args if params is not None else None
    return given.get(key) if given else None


def keep_generators(runner: Any) -> None:
    """Hides the random generators of requests whose prompt does not end in this pass, and shows the others'.

    vLLM samples for everyone and then takes back what it drew too early, in a way that a CPU's generators do not have:
    a seeded request with a prompt in two parts would end the engine. What is hidden draws nothing.
    """
    batch = runner.input_batch
    draws = ~runner.discard_request_mask.np[: batch.num_reqs]
    # The sampler holds this very dictionary.
    batch.generators.clear()
    for row, request in enumerate(batch.req_ids[: batch.num_reqs]):
        generator = runner.requests[request].generator
        if draws[row] and generator is not None:
            batch.generators[row] = generator


def state_of(runner: Any, request: str) -> Any:
    """What the runner knows of a request: an object that stays the same while the request lives."""
    return runner.requests[request]


def wipe(runner: Any, state: Any) -> None:
    """Writes zeros over those of a request's keys and values that are not finite, wherever they are now.

    The others stay as they are: a request with the same prompt may find them. Whoever gets a block after it reads the
    block's unused places too, at weight 0: what is not finite there would make his own values not finite. Only vLLM's
    attention on a CPU does that.
    """
    layers = runner.compilation_config.static_forward_context
    for group, blocks in zip(runner.kv_cache_config.kv_cache_groups, state.block_ids, strict=True):
        for name in group.layer_names:
            cache, held = layers[name].kv_cache, list(blocks)
            cache[held] = cache[held].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _is_real() -> bool:
    """Passes that measure memory or compile have no attention metadata."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().attn_metadata is not None
