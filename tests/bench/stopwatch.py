"""Where the time of one thread goes: calls are timed under names, and what a call spends in others counts there."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Seconds by name, each without what was spent inside it under another name. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._clock, self._since = clock, 0.0
        self._open: list[str] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count under that name."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._open.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        return call

    def watch(self, owner: type, method: str, name: str) -> None:
        """From now on every call of this method counts under that name."""
        setattr(owner, method, self.timed(name, getattr(owner, method)))

    def lap(self) -> dict[str, float]:
        """What was spent since the last lap."""
        found = dict(self.spent)
        self.spent.clear()
        return found

    def _switch(self) -> None:
        """The time up to now belongs to the innermost open call."""
        now = self._clock()
        if self._open:
            self.spent[self._open[-1]] += now - self._since
        self._since = now
