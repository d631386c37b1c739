"""When an engine that failed may start again."""

from __future__ import annotations

from saeguard_server.engine.front import GOOD_SERVICE_S, LONGEST_S, Backoff


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def test_the_first_start_is_at_once_and_each_one_after_waits_twice_as_long() -> None:
    backoff = Backoff(Clock())
    waits = [backoff.failed() for _ in range(12)]
    assert waits == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, *[LONGEST_S] * 5]


def test_an_engine_that_served_a_minute_has_recovered() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    for _ in range(4):
        backoff.failed()
    backoff.started()
    clock.now += GOOD_SERVICE_S - 0.01
    assert backoff.failed() == 4.0
    backoff.started()
    clock.now += GOOD_SERVICE_S
    assert [backoff.failed(), backoff.failed()] == [0.0, 0.5]


def test_time_in_which_it_did_not_serve_does_not_count() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    backoff.started()
    waits = []
    for _ in range(5):
        waits.append(backoff.failed())
        clock.now += 10 * GOOD_SERVICE_S  # as when each start takes that long and then fails
    assert waits == [0.0, 0.5, 1.0, 2.0, 4.0]


def test_it_waits_half_a_minute_at_most_however_often_it_fails() -> None:
    backoff = Backoff(Clock())
    assert max(backoff.failed() for _ in range(2000)) == LONGEST_S
