"""Who is read next. Holds queues and slots, no tensors.

Slots 0 to n-1 are the n requests that generate, so a decode step reads a prefix of the tables; slot n is the one whose
prompt is being read. When one leaves, the last ones move up.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from saeguard_server.engine.transformers.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Tokens ``[start, end)`` of a sequence to read in one forward pass."""

    sequence: Sequence
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """True when the prompt is read after this."""
        return self.end == self.sequence.prompt_tokens


@dataclass(frozen=True, slots=True)
class Move:
    """A sequence's state must go from slot ``source`` to the free slot ``target``."""

    sequence: Sequence
    source: int
    target: int


class Scheduler:
    """First come, first served, into ``slots`` slots."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.reading: Sequence | None = None

    @property
    def has_work(self) -> bool:
        """True while any request is not finished."""
        return bool(self.waiting or self.running or self.reading)

    @property
    def slots_in_use(self) -> int:
        """Slots that hold a request."""
        return len(self.running) + (self.reading is not None)

    def everyone(self) -> list[Sequence]:
        """Every request here."""
        return [*self.running, *([self.reading] if self.reading else []), *self.waiting]

    def add(self, sequence: Sequence) -> None:
        """Puts a request at the end of the queue."""
        self.waiting.append(sequence)

    def admit(self) -> Sequence | None:
        """Moves the next waiting request into the reading slot, if both are there; returns it."""
        if self.reading is not None or not self.waiting or len(self.running) >= self.slots:
            return None
        self.reading = self.waiting.popleft()
        self.reading.slot = len(self.running)
        return self.reading

    def next_part(self, budget: int) -> PromptPart | None:
        """The next at most ``budget`` tokens of the prompt being read."""
        if self.reading is None or budget < 1:
            return None
        start = self.reading.computed
        return PromptPart(self.reading, start, min(start + budget, self.reading.prompt_tokens))

    def start_generating(self) -> None:
        """The prompt is read: its request joins the running ones, in the slot it has."""
        assert self.reading is not None, "no prompt is being read"
        self.running.append(self.reading)
        self.reading = None

    def remove(self, sequence: Sequence) -> list[Move]:
        """Takes a request out, wherever it is. The moves keep the slots in use a prefix; do them in this order."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return []
        free, sequence.slot = sequence.slot, -1
        if sequence is self.reading:
            self.reading = None
            return []
        moves = []
        last = self.running.pop()
        if last is not sequence:
            moves.append(self._place(last, free))
            self.running[free] = last
        if self.reading is not None:
            moves.append(self._place(self.reading, len(self.running)))
        return moves

    def _place(self, sequence: Sequence, target: int) -> Move:
        move = Move(sequence, sequence.slot, target)
        sequence.slot = target
        return move
