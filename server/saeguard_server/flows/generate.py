"""Generate: from a checked request to chunks of text, steered as asked or refused before any work."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from saeguard_server.engine.protocol import Engine, GenerateTask
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.flows.prompt import check_length, encode
from saeguard_server.flows.steering import check_watchable, find_feature, resolve
from saeguard_server.reply import Chunk
from saeguard_server.request import Call, GenerationRequest
from saeguard_server.settings import LimitSettings


class Generate:
    """Text from the model, one request at a time to its callers, many at once in the engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, limits: LimitSettings) -> None:
        self._engine, self._tokenizer, self._limits = engine, tokenizer, limits

    async def stream(self, request: GenerationRequest, call: Call) -> AsyncGenerator[Chunk]:
        """Chunks as they are made; the last has a completion. Closing it frees the slot at the next step.

        Raises:
            UnknownName, InvalidRequest: what cannot be served as asked, by field, before any work.
            DeadlineExceeded, NonFiniteOutput, Unavailable, InternalFailure: from the engine.
        """
        task = await asyncio.to_thread(self._prepare, request, call)
        async with aclosing(self._engine.generate(task)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _prepare(self, request: GenerationRequest, call: Call) -> GenerateTask:
        watch = []
        for index, ref in enumerate(request.watch):
            check_watchable(find_feature(self._engine, ref, f"watch[{index}]"), f"watch[{index}].sae")
            watch.append((ref.sae, ref.feature))
        tokens = encode(self._tokenizer, request.prompt).ids
        context = self._engine.model.max_context
        check_length(request.prompt, len(tokens), context - 1)
        asked = request.sampling.max_new_tokens or self._limits.default_max_new_tokens
        new = min(asked, context - len(tokens))
        steering = resolve(
            self._engine,
            request.interventions,
            request.max_relative_edit,
            tokens,
            len(tokens) + new - 1,  # the last token is sampled and never read
            self._tokenizer.special_ids,
        )
        seed = request.sampling.seed
        return GenerateTask(
            call=call,
            tokens=tokens,
            sampling=request.sampling,
            max_new_tokens=new,
            seed=secrets.randbits(63) if seed is None else seed,
            steering=steering,
            watch=tuple(watch),
        )
