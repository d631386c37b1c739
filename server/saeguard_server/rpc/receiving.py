"""Messages on their way in. The core takes 64 KiB of one before it is read, and then all of it, whatever its size."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from saeguard_server.errors import DeadlineExceeded, Overloaded
from saeguard_server.fair_queue import SOON_S

PUBLIC_PLACES, PUBLIC_S, PUBLIC_PATIENCE_S = 8, 1.0, 0.25
"""Of the methods anybody may call: messages read at once, for how long. 32 MiB where none announces more than 4."""
PLACES, PATIENCE_S = 16, 2.0
"""Of the others: 64 MiB."""


class Receiving:
    """Reads messages, so many at once: the others wait with their first 64 KiB.

    The next is of the connection with the fewest that are read, the newest of them: what a newcomer sends is here at
    once, and what does not come is not waited for in its stead. While others wait, a message has ``patience_s``.
    """

    def __init__(self, places: int, patience_s: float, most_s: float) -> None:
        self._places, self._patience_s, self._most_s = places, patience_s, most_s
        self._reading = Counter[str]()
        self._waiting: dict[asyncio.Future[None], str] = {}

    async def read(self, context: grpc.aio.ServicerContext[Any, Any], within_s: float) -> Any:
        """The next message or EOF. Raises DeadlineExceeded, Overloaded: it does not come, or has no place, in time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        async with self._place(context.peer(), end):
            end = min(end, loop.time() + self._most_s)
            reading = asyncio.ensure_future(context.read())
            try:
                while not (await asyncio.wait({reading}, timeout=min(self._patience_s, end - loop.time())))[0]:
                    if self._waiting or loop.time() >= end:
                        raise DeadlineExceeded("the request's message did not arrive in time")
                return reading.result()
            finally:
                reading.cancel()

    @asynccontextmanager
    async def _place(self, connection: str, end: float) -> AsyncIterator[None]:
        if self._reading.total() < self._places:
            self._reading[connection] += 1
        else:
            await self._turn(connection, end)
        try:
            yield
        finally:
            self._leave(connection)

    async def _turn(self, connection: str, end: float) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = connection
        try:
            async with asyncio.timeout_at(end):
                await turn
        except BaseException as err:
            if self._waiting.pop(turn, None) is None:
                self._leave(connection)
            if isinstance(err, TimeoutError):
                raise Overloaded("too many messages are being received", SOON_S) from None
            raise

    def _leave(self, connection: str) -> None:
        self._reading[connection] -= 1
        if not self._reading[connection]:
            del self._reading[connection]
        turns = [turn for turn in reversed(self._waiting) if not turn.done()]
        if turns:
            turn = min(turns, key=lambda turn: self._reading[self._waiting[turn]])
            self._reading[self._waiting.pop(turn)] += 1
            turn.set_result(None)
