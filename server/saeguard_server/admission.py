"""Admission: whose request comes in, how much of it at once, and when it is its turn at the engine.

Over a limit a request is refused by name; under it, it may wait for its turn.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

from saeguard.requests import ActivationRequest, FeatureSelection, GenerateRequest
from saeguard.types import Condition, FeatureRef, Intervention
from saeguard_server.caller import Caller, Role
from saeguard_server.engine.protocol import Engine
from saeguard_server.errors import (
    InvalidRequest,
    Overloaded,
    ServiceError,
    Unavailable,
)
from saeguard_server.identity import auth
from saeguard_server.observe import Metrics
from saeguard_server.quotas import Quotas, TokenBudget
from saeguard_server.threads import WorkThreads

SOON_S = 1.0
"""When to come back to a server that is starting or stopping, or once one of the caller's own requests ends."""
SHORTEST_RETRY_S = 0.2
LONGEST_RETRY_S = 30.0
POLL_S = 0.01
"""How often the engine's queue is looked at while anybody waits: slots become free before slow readers are done."""
PROMPT_THREADS = 2
MAX_PROMPTS = 1024
"""Requests that wait to be tokenised and compiled."""
MAX_REMEMBERED = 1024
"""Callers remembered at once; beyond it, of those who wait no more, those that are ahead least are forgotten."""


class Admission:
    """Between a checked request and the engine."""

    def __init__(self, engine: Engine, metrics: Metrics, slots: int) -> None:
        self.turns = FairQueue(engine, metrics, slots)
        self.prompts = WorkThreads("prompts", PROMPT_THREADS, MAX_PROMPTS)
        """Where requests are tokenised and compiled."""
        self.quotas = Quotas(metrics)

    @asynccontextmanager
    async def request(
        self, caller: Caller, request: GenerateRequest | ActivationRequest
    ) -> AsyncIterator[AdmittedRequest]:
        """Around everything that is done for a request.

        Raises:
            PermissionDenied: it steers, reads features or writes special tokens, and the caller may not.
            InvalidRequest: it names a conversation, and the caller's token another or none.
            QuotaExceeded: it names too many features, or too many of the caller's requests run.
        """
        triggers = request.triggers if isinstance(request, GenerateRequest) else ()
        conversation = request.conversation if isinstance(request, GenerateRequest) else ""
        if conversation and caller.conversation not in (None, conversation):
            raise InvalidRequest("conversation", "must be the one in the caller's token, or left out")
        if request.interventions or triggers:
            auth.check_role(caller, Role.STEER, "a request with interventions or triggers")
        if _reads_features(request):
            auth.check_role(caller, Role.OBSERVE, "a request that watches features or has conditions on them")
        if request.parse_special_tokens:
            auth.check_role(caller, Role.SPECIAL_TOKENS, "a request with parse_special_tokens")
        with self.quotas.request(caller, len({ref for _, ref in named_features(request)})) as tokens:
            async with AsyncExitStack() as place:
                yield AdmittedRequest(tokens, self.turns, caller, place)


class AdmittedRequest:
    def __init__(self, tokens: TokenBudget, queue: FairQueue, caller: Caller, place: AsyncExitStack) -> None:
        self.tokens = tokens
        self._queue, self._caller, self._place = queue, caller, place

    async def turn(self, tokens: int) -> None:
        """Waits for a task's turn; a place it has is given up first. Raises ServiceError: it was evicted."""
        await self._place.aclose()
        await self._place.enter_async_context(self._queue.turn(self._caller.name, tokens))


def named_features(request: GenerateRequest | ActivationRequest) -> Iterator[tuple[str, FeatureRef]]:
    """Every feature that the request names, by field: edited, watched, read by itself, or in a condition."""
    for index, edit in enumerate(request.interventions):
        yield from _of_edit(edit, f"interventions[{index}]")
    if isinstance(request, ActivationRequest):
        named = request.selection.features if isinstance(request.selection, FeatureSelection) else ()
        yield from ((f"features.features[{index}]", ref) for index, ref in enumerate(named))
        return
    yield from ((f"watch[{index}]", ref) for index, ref in enumerate(request.watch))
    for index, trigger in enumerate(request.triggers):
        yield from _of_condition(trigger.when, f"triggers[{index}].when")
        for number, edit in enumerate(trigger.edits):
            yield from _of_edit(edit, f"triggers[{index}].apply.interventions[{number}]")


def _of_edit(edit: Intervention, field: str) -> Iterator[tuple[str, FeatureRef]]:
    yield field, edit.ref
    if edit.when is not None:
        yield from _of_condition(edit.when, f"{field}.when")


def _of_condition(condition: Condition, field: str) -> Iterator[tuple[str, FeatureRef]]:
    return ((f"{field}.terms[{index}]", term.ref) for index, term in enumerate(condition.terms))


def _reads_features(request: GenerateRequest | ActivationRequest) -> bool:
    """Whether the answer tells of values: what is watched; and a condition is a question about one."""
    if any(edit.when is not None for edit in request.interventions):
        return True
    return isinstance(request, GenerateRequest) and bool(request.watch or request.triggers)


# --- who enters the engine next: start-time fair queueing over callers, by tokens (Goyal, Vin and Cheng, 1996)
#
# The engine serves first come, first served. So its own queue is kept short, and whoever comes with a thousand requests
# waits here, behind one request of everybody else who waits.


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

    def __init__(self, engine: Engine, metrics: Metrics, slots: int) -> None:
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
        return self._waiting

    @asynccontextmanager
    async def turn(self, caller: str, cost: int) -> AsyncIterator[None]:
        """Around a request's time in the engine, ``cost`` tokens at most. Raises ServiceError: it was evicted."""
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


# --- the server's own limits


class LoadLimiter:
    def __init__(
        self,
        engine: Engine,
        turns: FairQueue,
        metrics: Metrics,
        *,
        max_queue: int,
        max_slots: int,
        max_unread: int = 2**31,
        prompts: WorkThreads | None = None,
    ) -> None:
        self._engine = engine
        self._queues = (turns,) if prompts is None else (turns, prompts)
        self._refusals = metrics.refusals
        self._max_queue = max_queue
        self._max_slots = max_slots
        self._typical_s = SOON_S
        self._working = 0
        self.unread = Waiting(max_unread, max_queue)
        """Of those that work, streams whose readers do not read: the engine goes on without them."""
        self._in_flight = InFlight()
        self._is_closed = False
        self.is_draining = False

    def start_draining(self) -> None:
        """The server is about to stop: it is no longer ready, but still takes what comes."""
        self.is_draining = True

    def close(self) -> None:
        self.is_draining = True
        self._is_closed = True

    async def idle(self, within_s: float) -> bool:
        return await self._in_flight.ended(within_s)

    @contextmanager
    def rpc(self) -> Iterator[None]:
        """Around every RPC. Raises Unavailable: the server is draining."""
        if self._is_closed:
            self._refusals.labels("draining").inc()
            raise Unavailable("the server is shutting down", retry_after_s=SOON_S)
        with self._in_flight:
            yield

    @contextmanager
    def admit(self, caller: Caller) -> Iterator[None]:
        """Around an RPC that needs the engine.

        Raises:
            Unavailable: the engine is not ready.
            Overloaded: the queue is full, and nobody has more in it than this caller.
        """
        self._refuse_if_full(caller)
        self._working += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._working -= 1
            self._typical_s += 0.1 * (time.monotonic() - began - self._typical_s)

    def _refuse_if_full(self, caller: Caller) -> None:
        if not self._engine.is_ready():
            self._refusals.labels("not_ready").inc()
            raise Unavailable("the engine is not ready", retry_after_s=SOON_S)
        # Counted here too: of many requests that come in one burst, none is in the engine's queue yet.
        is_burst = self._working - self.unread.total >= self._max_queue + self._max_slots
        if is_burst or self._engine.queued() >= self._max_queue:
            self._refusals.labels("queue_full").inc()
            refusal = Overloaded(
                f"{self._max_queue} requests are waiting already", retry_after_s=self._retry_after_s()
            )  # fmt: skip
            # One caller's thousand requests must not shut the door on everybody else.
            if not any(queue.evict(caller.name, refusal) for queue in self._queues):
                raise refusal

    def _retry_after_s(self) -> float:
        """Until about half of the queue has moved, spread so that those refused together do not return together."""
        half = self._typical_s * self._max_queue / (2 * self._max_slots)
        return min(max(half, SHORTEST_RETRY_S), LONGEST_RETRY_S) * random.uniform(1.0, 1.5)


FEW = 4


class Waiting:
    """What waits for somebody else than this server, and holds no place of the engine or its queue meanwhile."""

    def __init__(self, most_each: int, most: int) -> None:
        """At most so many of each caller, and of all of them together, but that everybody may have a few."""
        self._most_each, self._most = most_each, most
        self._counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._counts.total()

    def enter(self, caller: Caller) -> bool:
        """Whether there is room for one more; then ``leave`` must follow."""
        own = self._counts[caller.name]
        if own >= self._most_each or (own >= FEW and self.total >= self._most):
            return False
        self._counts[caller.name] += 1
        return True

    def leave(self, caller: Caller) -> None:
        self._counts[caller.name] -= 1
        if not self._counts[caller.name]:
            del self._counts[caller.name]

    @contextmanager
    def hold(self, caller: Caller, what: str) -> Iterator[None]:
        """Raises Overloaded: too many wait already."""
        if not self.enter(caller):
            raise Overloaded(f"too many requests wait for {what}", SOON_S)
        try:
            yield
        finally:
            self.leave(caller)


class InFlight:
    """Enter once for each thing that goes on, however many at once."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._count += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    async def ended(self, within_s: float) -> bool:
        """Waits until nothing goes on; False when that takes longer than ``within_s``."""
        try:
            await asyncio.wait_for(self._none.wait(), within_s)
        except TimeoutError:
            return False
        return True
