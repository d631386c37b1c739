"""Answers that nobody reads: their streams are counted apart from those that need the engine, and ended in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from saeguard_server.admission import Waiting
from saeguard_server.caller import Caller
from saeguard_server.errors import Cancelled, NotRead

CORE_ENDS_WITHIN_S = 1.0
"""How long the core is waited for where the end is its to tell; far more than it takes."""
SLOW_S = 0.25
"""A message that waits longer than this for its reader is unread. HTTP/2 takes some 64 KiB ahead of a reader."""


class ReplyWriter:
    """Writes the replies of one stream. What its generator makes meanwhile waits in the engine's hands, not here."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], caller: Caller, unread: Waiting, max_s: float):
        self._context, self._caller, self._unread, self._max_s = context, caller, unread, max_s
        self._loop = asyncio.get_running_loop()
        self._began: float | None = None
        self._is_unread = False
        self._why = ""

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Around the whole stream. Raises NotRead: a message was not read in time, or too many streams are unread."""
        self._timer = self._loop.call_later(SLOW_S, self._look)
        try:
            async with asyncio.timeout(None) as self._limit:
                yield
        except TimeoutError as err:
            if not self._why:
                raise
            raise NotRead(self._why) from err
        finally:
            self._timer.cancel()
            self._read()

    async def write(self, reply: Any) -> None:
        self._began = self._loop.time()
        try:
            await self._context.write(reply)
        except grpc.aio.InternalError as err:
            # The core knows that the caller is gone, and cancels us here.
            await asyncio.sleep(CORE_ENDS_WITHIN_S)
            raise Cancelled("the caller went away") from err
        self._began = None
        if self._is_unread:
            self._read()

    def _read(self) -> None:
        if self._is_unread:
            self._is_unread = False
            self._unread.leave(self._caller)

    def _look(self) -> None:
        self._timer = self._loop.call_later(SLOW_S, self._look)
        waited_s = 0.0 if self._began is None else self._loop.time() - self._began
        if waited_s < SLOW_S:
            return
        if not self._is_unread:
            self._is_unread = self._unread.enter(self._caller)
        if not self._is_unread:
            self._end("too many answers wait to be read")
        elif waited_s >= self._max_s:
            self._end(f"a message of the answer was not read within {self._max_s:g} s")

    def _end(self, why: str) -> None:
        self._why = why
        self._timer.cancel()
        self._limit.reschedule(self._loop.time())
