"""How a run ends when it does not end well. What a user got wrong beforehand is a TrainError."""

from __future__ import annotations

import signal

from saeguard_sae.train.errors import TrainError


class BadConfig(TrainError):
    """A configuration or a flag that cannot be used; the message names the key and what is allowed."""


class RunFailed(Exception):
    """A run that began and cannot go on; the message says what of it is kept."""


class RunLost(RunFailed):
    """One of several processes of which another is gone."""


class RunStopped(Exception):
    """A run that was asked to stop and saved itself."""

    def __init__(self, number: int, step: int, steps: int) -> None:
        """``number``: the signal; ``step`` of ``steps``: the last one done."""
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step:,} of {steps:,}, which is saved")
        self.number = number
