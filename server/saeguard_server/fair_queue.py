"""Whose request enters the engine next: start-time fair queueing over callers, by tokens (Goyal, Vin and Cheng, 1996).

The engine serves first come, first served. So its own queue is kept short, and whoever comes with a thousand requests
waits here, behind one request of everybody else who waits.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from saeguard_server.errors import ServiceError
from saeguard_server.observe import Metrics

POLL_S = 0.01
"""How often the engine's queue is looked at while anybody waits: slots become free before slow readers are done."""
MAX_REMEMBERED = 1024
"""Callers remembered at once; beyond it, of those who wait no more, those that are ahead least are forgotten."""


class EngineQueue(Protocol):
    """What is asked of an engine."""

    def queued(self) -> int:
        """Tasks that wait for a slot."""
        ...


@dataclass(slots=True, eq=False)
class _Waiter:
    cost: int
    turn: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class _Line:
    """One caller's requests, in the order in which they came.

    ``start`` is the virtual time of the next one, ``ticket`` its place in the order, None where nobody waits.
    """

    start: float = 0.0
    ticket: int | None = None
    waiters: deque[_Waiter] = field(default_factory=deque)


class FairQueue:
    """Lets requests into the engine, a few more than it has slots.

    Virtual time is what every caller who waits has been served, in tokens. A request starts where its caller's last one
    ended, or now; the one with the earliest start goes first. So between two callers who both wait, what they were
    served never differs by more than one request of each.
    """

    def __init__(self, engine: EngineQueue, metrics: Metrics, slots: int) -> None:
        self._engine, self._slots = engine, slots
        self._ahead = max(2, slots // 4)
        self._gauge = metrics.queue_waiting
        self._lines: dict[str, _Line] = {}
        self._order: list[tuple[float, int, _Line]] = []  # a heap; an entry whose ticket is not its line's is void
        self._tickets = itertools.count()
        self._now = 0.0
        self._running = self._unqueued = self._waiting = 0
        self._poll: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait here."""
        return self._waiting

    @asynccontextmanager
    async def turn(self, caller: str, cost: int) -> AsyncIterator[None]:
        """Waits for this request's turn; around its time in the engine. ``cost`` is the tokens it can take.

        Raises:
            ServiceError: it was evicted for a caller who had fewer waiting.
        """
        if self._waiting or not self._has_room():
            await self._wait(caller, cost)
        else:
            self._serve(self._line(caller), cost)
        try:
            yield
        finally:
            self._running -= 1
            self._admit()

    def evict(self, caller: str, error: ServiceError) -> bool:
        """Makes room for this caller: the last request of the longest line fails with ``error``.

        Returns:
            False where nobody has more requests waiting than it would then have.
        """
        longest = max(self._lines.values(), key=lambda line: len(line.waiters), default=_Line())
        mine = len(self._lines[caller].waiters) if caller in self._lines else 0
        if len(longest.waiters) <= mine + 1:
            return False
        last = longest.waiters.pop()
        self._count_waiting(-1)
        if not last.turn.done():
            last.turn.set_exception(error)
        return True

    def _has_room(self) -> bool:
        # Both: who holds a slot may be done with it and be read slowly; who was just let in is not in the queue yet.
        return self._running < self._slots or self._engine.queued() + self._unqueued < self._ahead

    async def _wait(self, caller: str, cost: int) -> None:
        waiter, line = _Waiter(cost, asyncio.get_running_loop().create_future()), self._line(caller)
        line.waiters.append(waiter)
        if line.ticket is None:
            self._enter(line)
        self._count_waiting(1)
        self._poll_soon()
        try:
            await waiter.turn
        except asyncio.CancelledError:
            self._leave(line, waiter)
            raise

    def _leave(self, line: _Line, waiter: _Waiter) -> None:
        """The caller is gone; perhaps just as its turn came."""
        if waiter.turn.done() and not waiter.turn.cancelled():
            if waiter.turn.exception() is None:
                self._running -= 1
                self._admit()
            return
        with suppress(ValueError):
            line.waiters.remove(waiter)
            self._count_waiting(-1)
        if not line.waiters:
            line.ticket = None

    def _admit(self) -> None:
        while self._order and self._has_room():
            _, ticket, line = heapq.heappop(self._order)
            if ticket != line.ticket:
                continue
            line.ticket = None
            while line.waiters and line.waiters[0].turn.done():
                line.waiters.popleft()  # cancelled in this very moment
                self._count_waiting(-1)
            if line.waiters:
                waiter = line.waiters.popleft()
                self._count_waiting(-1)
                self._serve(line, waiter.cost)
                waiter.turn.set_result(None)
            if line.waiters:
                self._enter(line)
        if not self._running and not self._waiting:
            self._lines.clear()
            self._order.clear()
            self._now = 0.0

    def _serve(self, line: _Line, cost: int) -> None:
        self._now = max(self._now, line.start)
        line.start = self._now + cost
        self._running += 1
        if self._running > self._slots:
            self._unqueued += 1
            self._poll_soon()

    def _enter(self, line: _Line) -> None:
        line.start, line.ticket = max(self._now, line.start), next(self._tickets)
        heapq.heappush(self._order, (line.start, line.ticket, line))

    def _line(self, caller: str) -> _Line:
        if caller not in self._lines:
            if len(self._lines) >= MAX_REMEMBERED:
                self._forget()
            self._lines[caller] = _Line(self._now)
        return self._lines[caller]

    def _forget(self) -> None:
        idle = [name for name, line in self._lines.items() if not line.waiters]
        for name in sorted(idle, key=lambda name: self._lines[name].start)[: MAX_REMEMBERED // 2]:
            del self._lines[name]

    def _count_waiting(self, more: int) -> None:
        self._waiting += more
        self._gauge.set(self._waiting)

    def _poll_soon(self) -> None:
        if self._poll is None:
            self._poll = asyncio.get_running_loop().call_later(POLL_S, self._poll_now)

    def _poll_now(self) -> None:
        self._poll, self._unqueued = None, 0
        self._admit()
        if self._waiting:
            self._poll_soon()
