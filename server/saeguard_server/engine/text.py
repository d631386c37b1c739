"""Generated tokens to the text a caller sees: stop strings are found across tokens and never shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """Tokens to text, piece by piece."""

    def push(self, tokens: Sequence[int]) -> str: ...


class Assembler:
    """The text of one request. What could still become a stop string is held back until it is decided."""

    def __init__(self, decoder: Decoder, stops: tuple[str, ...]) -> None:
        self._decoder, self._stops = decoder, stops
        self._held = ""
        self.stopped_by = ""
        """The stop string that ended the text; empty while none did."""

    def push(self, token: int) -> str:
        """The text that is certain with this token; ``stopped_by`` is set when it completed a stop string."""
        self._held += self._decoder.push((token,))
        found = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            at, self.stopped_by = min(found)
            text, self._held = self._held[:at], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """What was held back when the generation ended otherwise."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
