"""How far an answer's tokens are from what the model would have said under another steering."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from saeguard_server.engine.divergence import Divergence, Side
from saeguard_server.engine.protocol import Engine, GenerateTask, Steering
from saeguard_server.errors import InternalFailure
from saeguard_server.reply import Chunk
from saeguard_server.request import Sampling

MAX_NEW_TOKENS = 512
"""What waits for the other side is a row of the vocabulary for each token."""


async def divergence(engine: Engine, task: GenerateTask, answer: Sequence[int], other: Steering) -> tuple[float, ...]:
    """KL(task's steering || other) in nats of the next-token distributions, for each token of the task's answer.

    Both read the same tokens, in the same batch.

    Raises:
        SaeguardError: as for a generation.
    """
    if not answer:
        return ()
    measure = Divergence(len(task.tokens) - 1, len(answer))

    def reading(side: Side, steering: Steering) -> GenerateTask:
        return replace(
            task,
            tokens=(*task.tokens, *answer[:-1]),  # the last is not read to be drawn
            sampling=Sampling(temperature=0.0, prompt_logprobs=True),
            max_new_tokens=1,
            # The answer is there: it is read to its end.
            steering=replace(steering, guards=tuple(replace(guard, stops=False) for guard in steering.guards)),
            watch=(),
            measure=(measure, side),
        )

    await asyncio.gather(whole(engine, reading("steered", task.steering)), whole(engine, reading("unsteered", other)))
    return measure.result()


async def whole(engine: Engine, task: GenerateTask) -> tuple[Chunk, ...]:
    """Every chunk of a task.

    Raises:
        SaeguardError: as for a generation.
    """
    async with aclosing(engine.generate(task)) as chunks:
        found = [chunk async for chunk in chunks]
    if not found or found[-1].completion is None:
        raise InternalFailure("a generation ended without its completion")
    return tuple(found)


def ids(chunks: Sequence[Chunk]) -> tuple[int, ...]:
    """The tokens of an answer."""
    return tuple(token.id for chunk in chunks for token in chunk.tokens)
