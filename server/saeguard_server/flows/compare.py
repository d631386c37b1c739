"""Compare: one request with everything that is done to it and without any of that, side by side in one batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from saeguard_server.engine.protocol import Engine, Steering
from saeguard_server.errors import InvalidRequest
from saeguard_server.flows.generate import Generate, with_facts
from saeguard_server.flows.keeping import Keeping
from saeguard_server.flows.measuring import MAX_NEW_TOKENS, divergence, ids, whole
from saeguard_server.guard.gate import Gate
from saeguard_server.reply import Chunk
from saeguard_server.request import Call, GenerationRequest


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both answers, chunk by chunk, and how far they are apart."""

    steered: tuple[Chunk, ...]
    unsteered: tuple[Chunk, ...]
    first_divergence: int | None
    """Index of the first token that differs; None where both are the same."""
    kl_nats: tuple[float, ...]
    """For each token of the steered answer, after the same tokens: KL(steered || unsteered)."""


class Compare:
    """Runs a request twice at once, and reads the steered answer once more, with and without."""

    def __init__(self, engine: Engine, generate: Generate, gate: Gate, keeping: Keeping | None = None) -> None:
        self._engine, self._generate, self._gate = engine, generate, gate
        self._keeping = keeping or Keeping()

    async def run(self, request: GenerationRequest, call: Call) -> Comparison:
        """The comparison.

        Raises:
            InvalidRequest: too many tokens, prompt log-probabilities, or an engine that cannot measure.
            SaeguardError: as for a generation.
        """
        self._check(request)
        keeping = self._keeping.request(request, call, is_comparison=True)
        with keeping as kept, self._gate.request(call.caller, request) as spending:
            ready = await self._generate.prepare(request, call)
            task = ready.task
            if task.max_new_tokens > MAX_NEW_TOKENS:
                raise InvalidRequest("sampling.max_new_tokens", f"at most {MAX_NEW_TOKENS} here")
            # Two answers, and one of them read twice.
            most = 4 * (len(task.tokens) + task.max_new_tokens)
            spending.take(most)
            await kept.admit(ready)
            async with self._gate.turn(call.caller, most):
                plain = replace(task, steering=Steering())
                steered, unsteered = await asyncio.gather(whole(self._engine, task), whole(self._engine, plain))
                kl = await divergence(self._engine, task, ids(steered), Steering())
            spending.use(4 * len(task.tokens) + 3 * len(ids(steered)) + len(ids(unsteered)))
            told = steered if ready.facts is None else tuple(with_facts(one, ready.facts) for one in steered)
            for chunk in told:
                await kept.tell(chunk)
        return Comparison(told, unsteered, first_divergence(ids(steered), ids(unsteered)), kl)

    def _check(self, request: GenerationRequest) -> None:
        if not self._engine.capabilities.compares:
            raise InvalidRequest("request", f"the {self._engine.capabilities.engine} engine cannot compare")
        if request.sampling.prompt_logprobs:
            raise InvalidRequest("sampling.prompt_logprobs", "must not be set here")


def first_divergence(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; where one ends, that of its end."""
    pairs = enumerate(zip_longest(one, other))
    return next((index for index, (a, b) in pairs if a != b), None)
