"""Quotas: what is refused, when to come back, what is given back."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from saeguard_server.caller import LOCAL, Caller, Quota, Role
from saeguard_server.errors import (
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    PolicyRefusal,
    QuotaExceeded,
    ServiceError,
    Unavailable,
)
from saeguard_server.observe import Metrics
from saeguard_server.quotas import BYTES_PER_TOKEN, Quotas


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def caller(name: str = "a", **quota: int) -> Caller:
    return Caller(name, frozenset(Role), quota=Quota(**quota))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(metrics: Metrics, clock: Clock) -> Quotas:
    return Quotas(metrics, clock)


def refusal(quotas: Quotas, who: Caller, features: int = 0, tokens: int = 0) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as caught, quotas.request(who, features) as budget:
        budget.resize(tokens)
    return caught.value


def test_requests_at_once(quotas: Quotas, metrics: Any) -> None:
    who = caller(max_concurrent=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(quotas.request(who, 0))
        error = refusal(quotas, who)
        assert (error.quota, error.facts) == ("max_concurrent", {"quota": "max_concurrent"})
        assert error.retry_after_s
        with quotas.request(caller("b", max_concurrent=1), 0):
            pass
    with quotas.request(who, 0):
        pass
    assert metrics.refusals.labels("quota_max_concurrent")._value.get() == 1


def test_features_of_a_request(quotas: Quotas) -> None:
    with quotas.request(caller(max_features=3), 3):
        pass
    error = refusal(quotas, caller(max_features=3), features=4)
    assert (error.quota, error.retry_after_s) == ("max_features", None), "coming back would not help"


def test_tokens_are_taken_at_once_and_what_was_not_used_is_given_back(quotas: Quotas, clock: Clock) -> None:
    who = caller(tokens_per_minute=600)
    with quotas.request(who, 0) as tokens:
        tokens.resize(500)
        assert refusal(quotas, who, tokens=200).retry_after_s == pytest.approx(10.0)
        tokens.charge(100)
    with quotas.request(who, 0) as tokens:
        tokens.resize(500)
        tokens.charge(500)
    assert refusal(quotas, who, tokens=1).retry_after_s == pytest.approx(0.1)
    clock.now += 30.0
    with quotas.request(who, 0) as tokens:
        tokens.resize(300)
        tokens.charge(300)
    clock.now += 1000.0
    assert refusal(quotas, who, tokens=601).retry_after_s is None, "no wait makes room for more than a minute's"


def test_a_message_is_paid_for_where_it_is_refused_and_else_given_back(quotas: Quotas) -> None:
    who = caller(tokens_per_minute=600)
    for error in (InvalidRequest("x", "y"), PolicyRefusal("x", "y", policy="p"), PermissionDenied("x", "steer")):
        level = left(quotas, who)
        with pytest.raises(type(error)), quotas.message(who, 80 * BYTES_PER_TOKEN):
            raise error
        assert left(quotas, who) == level - 80
    for other in (Overloaded("x", 1.0), Unavailable("x"), QuotaExceeded("x", "max_concurrent", 1.0), None):
        level = left(quotas, who)
        with suppress(ServiceError), quotas.message(who, 80 * BYTES_PER_TOKEN):
            if other is not None:
                raise other
        assert left(quotas, who) == level
    with pytest.raises(QuotaExceeded), quotas.message(who, 601 * BYTES_PER_TOKEN):
        pytest.fail("nothing is read of it")


def test_a_messages_tokens_take_the_place_of_its_size(quotas: Quotas) -> None:
    who = caller(tokens_per_minute=600)
    with quotas.message(who, 100 * BYTES_PER_TOKEN), quotas.request(who, 0) as tokens:
        assert left(quotas, who) == 500
        tokens.resize(550)
        assert left(quotas, who) == 50
        tokens.charge(200)
    assert left(quotas, who) == 400


def test_too_many_tokens_pay_for_having_been_counted_and_fit_when_told_to_come_back(
    quotas: Quotas, clock: Clock
) -> None:
    who, size = caller(tokens_per_minute=600), 100 * BYTES_PER_TOKEN
    with quotas.request(who, 0) as tokens:
        tokens.resize(400)
        tokens.charge(400)
    with pytest.raises(QuotaExceeded) as caught, quotas.message(who, size), quotas.request(who, 0) as tokens:
        tokens.resize(600)
    assert left(quotas, who) == 100
    assert caught.value.retry_after_s == pytest.approx(50.0)
    clock.now += 50.0
    with quotas.message(who, size), quotas.request(who, 0) as tokens:
        tokens.resize(600)


def left(quotas: Quotas, who: Caller) -> float:
    return quotas._account(who).level(quotas._clock())


def test_without_a_quota_nothing_is_counted(quotas: Quotas) -> None:
    with quotas.request(LOCAL, 10**6) as tokens:
        tokens.resize(10**9)
    assert not quotas._accounts


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100), st.integers(0, 100), st.floats(0, 30)), max_size=40)
)
def test_nobody_uses_more_than_a_minute_allows(acts: list[tuple[str, int, int, float]]) -> None:
    clock, rate = Clock(), 120
    quotas = Quotas(Metrics(CollectorRegistry()), clock)
    used: dict[str, list[tuple[float, int]]] = {}
    waits: list[float] = []
    for name, wanted, share, pause in acts:
        try:
            with quotas.request(caller(name, tokens_per_minute=rate), 0) as tokens:
                tokens.resize(wanted)
                tokens.charge(wanted * share // 100)
                used.setdefault(name, []).append((clock.now, wanted * share // 100))
        except QuotaExceeded as err:
            waits.append(err.retry_after_s or 0.0)
        clock.now += pause
    assert all(0 < wait <= 60 for wait in waits)
    for events in used.values():
        for start, _ in events:
            inside = [tokens for at, tokens in events if start <= at < start + 60]
            # What was saved up, and what a minute brings.
            assert sum(inside) <= 2 * rate


def test_callers_who_use_nothing_are_forgotten(quotas: Quotas, clock: Clock) -> None:
    for number in range(1000):
        with quotas.request(caller(f"c{number}", tokens_per_minute=60), 0) as tokens:
            tokens.resize(1)
            tokens.charge(1)
        clock.now += 1.0
    assert len(quotas._accounts) < 10
