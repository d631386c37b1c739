"""Admission: whose request comes in, how much of it at once, and when it is its turn at the engine.

Over a limit a request is refused by name, never parked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import chain

from saeguard.requests import ActivationRequest, FeatureSelection, GenerateRequest
from saeguard.types import Condition, FeatureRef, Intervention, Trigger
from saeguard_server.caller import UNLIMITED, Caller, Quota, Role
from saeguard_server.engine.protocol import Engine
from saeguard_server.errors import Overloaded, QuotaExceeded, Unavailable
from saeguard_server.fair_queue import FairQueue
from saeguard_server.identity import auth
from saeguard_server.observe import Metrics

MINUTE_S = 60.0
SOON_S = 1.0
"""When to come back to a server that is starting or stopping, or once one of the caller's own requests ends."""
SHORTEST_RETRY_S = 0.2
LONGEST_RETRY_S = 30.0


class Admission:
    """Between a checked request and the engine."""

    def __init__(self, engine: Engine, metrics: Metrics, slots: int) -> None:
        self.turns = FairQueue(engine, metrics, slots)
        self._quotas = Quotas(metrics)

    @asynccontextmanager
    async def request(
        self, caller: Caller, request: GenerateRequest | ActivationRequest
    ) -> AsyncIterator[AdmittedRequest]:
        """Around everything that is done for a request.

        Raises:
            PermissionDenied: it steers, and the caller may not.
            QuotaExceeded: it names too many features, or too many of the caller's requests run.
        """
        triggers = request.triggers if isinstance(request, GenerateRequest) else ()
        if request.interventions or triggers:
            auth.check_role(caller, Role.STEER, "a request with interventions or triggers")
        with self._quotas.request(caller, len(named_features(request))) as tokens:
            async with AsyncExitStack() as place:
                yield AdmittedRequest(tokens, self.turns, caller, place)


class AdmittedRequest:
    """A request within its caller's quota; it holds a place in the engine from ``turn`` on."""

    def __init__(self, tokens: TokenBudget, queue: FairQueue, caller: Caller, place: AsyncExitStack) -> None:
        self.tokens = tokens
        self._queue, self._caller, self._place = queue, caller, place

    async def turn(self, tokens: int) -> None:
        """Waits for the turn of a task that can take so many tokens; a place it has is given up first.

        Raises:
            ServiceError: it was evicted for a caller who had fewer waiting.
        """
        await self._place.aclose()
        await self._place.enter_async_context(self._queue.turn(self._caller.name, tokens))


def named_features(request: GenerateRequest | ActivationRequest) -> set[FeatureRef]:
    """Every feature that the request names: edited, watched, read by itself, or in a condition."""
    edited = set(chain.from_iterable(map(_of_edit, request.interventions)))
    if isinstance(request, GenerateRequest):
        return edited.union(request.watch, *map(_of_trigger, request.triggers))
    return edited.union(request.selection.features if isinstance(request.selection, FeatureSelection) else ())


def _of_edit(edit: Intervention) -> set[FeatureRef]:
    return {edit.ref} | (_of_condition(edit.when) if edit.when is not None else set())


def _of_trigger(trigger: Trigger) -> set[FeatureRef]:
    return _of_condition(trigger.when).union(*map(_of_edit, trigger.edits))


def _of_condition(condition: Condition) -> set[FeatureRef]:
    return {term.ref for term in condition.terms}


# --- quotas: requests at once, tokens a minute, features of a request


class Quotas:
    """Every caller's account; those that are as good as new are forgotten."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._refusals, self._clock = metrics.refusals, clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    @contextmanager
    def request(self, caller: Caller, features: int) -> Iterator[TokenBudget]:
        """Around one request that names so many features.

        Raises:
            QuotaExceeded: too many features, or too many of the caller's requests run already.
        """
        if caller.quota == UNLIMITED:
            yield TokenBudget(self, caller)
            return
        self._check(caller, features)
        tokens = TokenBudget(self, caller)
        self._account(caller).running += 1
        try:
            yield tokens
        finally:
            self._account(caller).running -= 1
            tokens.close()

    def reserve(self, caller: Caller, tokens: int) -> None:
        """Takes tokens out of the caller's bucket, or none.

        Raises:
            QuotaExceeded: it has not so many, or could never have.
        """
        most = caller.quota.tokens_per_minute
        if most is None:
            return
        now, account = self._clock(), self._account(caller)
        missing = tokens - account.level(now)
        if missing > 0:
            self._refuse(
                f"{caller.name} may use {most} tokens a minute, and this request can take {tokens}",
                "tokens_per_minute",
                missing * MINUTE_S / most if tokens <= most else None,
            )
        account.add(-tokens, now)

    def give_back(self, caller: Caller, tokens: int) -> None:
        """Puts tokens back that were not used."""
        if caller.quota.tokens_per_minute is not None and tokens > 0:
            self._account(caller).add(tokens, self._clock())

    def _check(self, caller: Caller, features: int) -> None:
        quota = caller.quota
        if quota.max_features is not None and features > quota.max_features:
            message = f"{caller.name} may name {quota.max_features} features in a request, got {features}"
            self._refuse(message, "max_features", None)
        if quota.max_concurrent is not None and self._account(caller).running >= quota.max_concurrent:
            message = f"{caller.name} may have {quota.max_concurrent} requests at once"
            self._refuse(message, "max_concurrent", SOON_S)

    def _refuse(self, message: str, quota: str, retry_after_s: float | None) -> None:
        self._refusals.labels(f"quota_{quota}").inc()
        raise QuotaExceeded(message, quota, retry_after_s)

    def _account(self, caller: Caller) -> _Account:
        if caller.name not in self._accounts:
            self._forget_idle()
            self._accounts[caller.name] = _Account(caller.quota, self._clock())
        self._accounts.move_to_end(caller.name)
        return self._accounts[caller.name]

    def _forget_idle(self) -> None:
        """From those that were not heard of for longest: two for each that is added."""
        now = self._clock()
        for name in list(self._accounts)[:2]:
            if self._accounts[name].is_idle(now):
                del self._accounts[name]


class TokenBudget:
    """The tokens of one request: what was reserved for it when it came in, and what it has used."""

    def __init__(self, quotas: Quotas, caller: Caller) -> None:
        self._quotas, self._caller = quotas, caller
        self._reserved = self._charged = 0

    def reserve(self, tokens: int) -> None:
        """Sets aside what the request can use at most.

        Raises:
            QuotaExceeded: the caller has not so many.
        """
        self._quotas.reserve(self._caller, tokens)
        self._reserved += tokens

    def charge(self, tokens: int) -> None:
        """Counts what was read or generated."""
        self._charged += tokens

    def close(self) -> None:
        """Gives back what was not used."""
        self._quotas.give_back(self._caller, self._reserved - self._charged)


class _Account:
    """One caller's use. The bucket holds what may be used at once and fills up within a minute."""

    def __init__(self, quota: Quota, now: float) -> None:
        self.running = 0
        self._size = quota.tokens_per_minute or 0
        self._level, self._at = float(self._size), now

    def level(self, now: float) -> float:
        self._level = min(self._level + (now - self._at) * self._size / MINUTE_S, self._size)
        self._at = now
        return self._level

    def add(self, tokens: int, now: float) -> None:
        self._level = min(self.level(now) + tokens, self._size)

    def is_idle(self, now: float) -> bool:
        """Whether it is as good as new."""
        return not self.running and self.level(now) >= self._size


# --- the server's own limits


class RpcLimiter:
    """Counts the RPCs in flight and refuses what is too much."""

    def __init__(self, engine: Engine, turns: FairQueue, metrics: Metrics, *, max_queue: int, max_slots: int) -> None:
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
            if not self._turns.evict(caller.name, refusal):
                raise refusal

    def _retry_after_s(self) -> float:
        """Until about half of the queue has moved, spread so that those refused together do not return together."""
        half = self._typical_s * self._max_queue / (2 * self._max_slots)
        return min(max(half, SHORTEST_RETRY_S), LONGEST_RETRY_S) * random.uniform(1.0, 1.5)


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
