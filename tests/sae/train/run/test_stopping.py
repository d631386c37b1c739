"""Signals are noted once and then have their usual effect."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from saeguard_sae.train.run.run import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.number is None
        os.kill(os.getpid(), number)
        assert stop.number == number
        assert signal.getsignal(number) == before
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_second_one_interrupts() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT


def test_other_threads_leave_signals_alone() -> None:
    seen = []

    def enter() -> None:
        with StopSignals() as stop:
            seen.append((stop.number, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
