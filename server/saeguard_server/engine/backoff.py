"""When an engine that failed may start again."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_S, LONGEST_S = 0.5, 30.0
GOOD_SERVICE_S = 60.0
"""An engine that ran this long has recovered."""


class Backoff:
    """Waits before each start: none before the first, then half a second, doubled each time, up to half a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._started: float | None = None

    def started(self) -> None:
        """Notes that it serves again."""
        self._started = self._clock()

    def failed(self) -> float:
        """Notes a failure, of a running engine or of a start -> seconds to wait before the next start."""
        if self._started is not None and self._clock() - self._started >= GOOD_SERVICE_S:
            self._failures = 0
        self._failures, self._started = self._failures + 1, None
        doublings = min(self._failures - 2, 10)  # 2 ** n overflows a float at last
        return 0.0 if self._failures == 1 else min(FIRST_S * 2.0**doublings, LONGEST_S)
