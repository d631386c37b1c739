"""What each caller uses of its quota: requests at once, tokens a minute, features of a request."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from saeguard_server.caller import UNLIMITED, Caller, Quota
from saeguard_server.errors import QuotaExceeded
from saeguard_server.observe.metrics import Metrics

MINUTE_S = 60.0
SOON_S = 1.0
"""When to come back for a place: nobody knows when one of the caller's own requests ends."""


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


class Spending:
    """The tokens of one request: what was taken for it when it came in, and what it has used."""

    def __init__(self, quotas: Quotas, caller: Caller) -> None:
        self._quotas, self._caller = quotas, caller
        self._taken = self._used = 0

    def take(self, tokens: int) -> None:
        """Takes what the request can use at most.

        Raises:
            QuotaExceeded: the caller has not so many.
        """
        self._quotas.take(self._caller, tokens)
        self._taken += tokens

    def use(self, tokens: int) -> None:
        """Counts what was read or generated."""
        self._used += tokens

    def close(self) -> None:
        """Gives back what was not used."""
        self._quotas.give_back(self._caller, self._taken - self._used)


class Quotas:
    """Every caller's account; those that are as good as new are forgotten."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._refusals, self._clock = metrics.refusals, clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    @contextmanager
    def request(self, caller: Caller, features: int) -> Iterator[Spending]:
        """Around one request that names so many features.

        Raises:
            QuotaExceeded: too many features, or too many of the caller's requests run already.
        """
        if caller.quota == UNLIMITED:
            yield Spending(self, caller)
            return
        self._check(caller, features)
        spending = Spending(self, caller)
        self._account(caller).running += 1
        try:
            yield spending
        finally:
            self._account(caller).running -= 1
            spending.close()

    def take(self, caller: Caller, tokens: int) -> None:
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
            said = f"{caller.name} may name {quota.max_features} features in a request, got {features}"
            self._refuse(said, "max_features", None)
        if quota.max_concurrent is not None and self._account(caller).running >= quota.max_concurrent:
            said = f"{caller.name} may have {quota.max_concurrent} requests at once"
            self._refuse(said, "max_concurrent", SOON_S)

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
