"""A count of what is going on, and a way to wait until nothing is."""

from __future__ import annotations

import asyncio
from types import TracebackType


class InFlight:
    """Enter once for each thing that goes on, however many at once."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._count += 1
        self._none.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
