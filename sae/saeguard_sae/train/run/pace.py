"""How fast a run goes. Times are the host's: nothing here waits for a device."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Seconds and tokens of this process, on top of those before it was resumed."""

    def __init__(self, before_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._before_s = before_s
        self._begun = self._mark = clock()
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """More were learnt from."""
        self._tokens += tokens

    def elapsed_s(self) -> float:
        """Of the whole run."""
        return self._before_s + self._clock() - self._begun

    def left_s(self, step: int, steps: int) -> float:
        """Until the last of ``steps``, at the mean pace of the run."""
        return self.elapsed_s() / step * (steps - step)

    def tokens_per_s(self) -> float:
        """Since the last lap."""
        return self._tokens / max(self._clock() - self._mark, 1e-9)

    def lap(self) -> float:
        """The same, and begins the next."""
        pace = self.tokens_per_s()
        self._mark, self._tokens = self._clock(), 0
        return pace
