"""Time belongs to the innermost call."""

from __future__ import annotations

import pytest

from bench.stopwatch import Stopwatch


class Clock:
    """Moves only when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_is_spent_inside_another_name_counts_there() -> None:
    clock = Clock()
    watch = Stopwatch(clock)

    def inner() -> None:
        clock.now += 5.0

    timed = watch.timed("inner", inner)

    def outer() -> None:
        clock.now += 1.0
        timed()
        clock.now += 2.0
        timed()

    watch.timed("outer", outer)()
    clock.now += 100.0
    assert watch.lap() == {"outer": 3.0, "inner": 10.0}
    assert watch.lap() == {}


def test_a_call_that_fails_is_closed() -> None:
    clock = Clock()
    watch = Stopwatch(clock)

    def fails() -> None:
        clock.now += 1.0
        raise ValueError("out of order")

    with pytest.raises(ValueError, match="out of order"):
        watch.timed("failing", fails)()
    clock.now += 7.0
    watch.timed("next", lambda: None)()
    assert watch.lap() == {"failing": 1.0, "next": 0.0}


def test_methods_are_watched_on_every_instance() -> None:
    clock = Clock()
    watch = Stopwatch(clock)

    class Worker:
        def work(self, seconds: float) -> float:
            clock.now += seconds
            return seconds

    early = Worker()
    watch.watch(Worker, "work", "work")
    assert early.work(2.0) == 2.0
    assert Worker().work(seconds=3.0) == 3.0
    assert watch.lap() == {"work": 5.0}
