"""Admission: how much runs and waits at once. Over the limit a request is refused by name, never parked."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from saeguard_server.caller import Caller
from saeguard_server.errors import Overloaded, Unavailable
from saeguard_server.guard.fairness import Turns
from saeguard_server.guard.in_flight import InFlight
from saeguard_server.observe.metrics import Metrics

SOON_S = 1.0
"""When to come back to a server that is starting or stopping."""
SHORTEST_RETRY_S = 0.2
LONGEST_RETRY_S = 30.0


class Load(Protocol):
    """What admission asks of an engine."""

    def is_ready(self) -> bool:
        """Whether a task submitted now would be taken up."""
        ...

    def queued(self) -> int:
        """Tasks that wait for a slot."""
        ...


class Admission:
    """Counts the RPCs in flight and refuses what is too much."""

    def __init__(self, engine: Load, turns: Turns, metrics: Metrics, *, max_queue: int, max_slots: int) -> None:
        self._engine = engine
        self._turns = turns
        self._refusals = metrics.refusals
        self._max_queue = max_queue
        self._max_slots = max_slots
        self._typical_s = SOON_S
        self._working = 0
        self._in_flight = InFlight()
        self._is_closed = False
        self.is_leaving = False

    def leave(self) -> None:
        """The server is about to stop: it is no longer ready, but still takes what comes."""
        self.is_leaving = True

    def close(self) -> None:
        """Refuses every RPC from now on."""
        self.is_leaving = True
        self._is_closed = True

    async def idle(self, within_s: float) -> bool:
        """Waits until no RPC is in flight; False when that takes longer than ``within_s``."""
        return await self._in_flight.ended(within_s)

    @contextmanager
    def rpc(self) -> Iterator[None]:
        """Around every RPC.

        Raises:
            Unavailable: the server is draining.
        """
        if self._is_closed:
            self._refusals.labels("draining").inc()
            raise Unavailable("the server is shutting down", retry_after_s=SOON_S)
        with self._in_flight:
            yield

    @contextmanager
    def work(self, caller: Caller) -> Iterator[None]:
        """Around an RPC that needs the engine.

        Raises:
            Unavailable: the engine is not ready.
            Overloaded: the queue is full, and nobody has more in it than this caller.
        """
        self._check_room(caller)
        self._working += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._working -= 1
            self._typical_s += 0.1 * (time.monotonic() - began - self._typical_s)

    def _check_room(self, caller: Caller) -> None:
        if not self._engine.is_ready():
            self._refusals.labels("not_ready").inc()
            raise Unavailable("the engine is not ready", retry_after_s=SOON_S)
        # Counted here too: of many requests that come in one burst, none is in the engine's queue yet.
        is_burst = self._working >= self._max_queue + self._max_slots
        if is_burst or self._engine.queued() >= self._max_queue:
            self._refusals.labels("queue_full").inc()
            refusal = Overloaded(
                f"{self._max_queue} requests are waiting already", retry_after_s=self._retry_after_s()
            )  # fmt: skip
            # One caller's thousand requests must not shut the door on everybody else.
            if not self._turns.send_away(caller.name, refusal):
                raise refusal

    def _retry_after_s(self) -> float:
        """Until about half of the queue has moved, spread so that those refused together do not return together."""
        half = self._typical_s * self._max_queue / (2 * self._max_slots)
        return min(max(half, SHORTEST_RETRY_S), LONGEST_RETRY_S) * random.uniform(1.0, 1.5)
