"""Whether a request can end in time: how fast the engine steps, how long answers are, what runs and waits before it."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, log2

from saeguard.results import StreamChunk
from saeguard_server.engine.pace import StepPace
from saeguard_server.engine.protocol import Engine

MAX_REMEMBERED = 1024
"""Callers whose answers are remembered, the latest."""
WEIGHT = 0.1
"""Of the latest answer in a mean."""
TYPICAL = 6.0
"""Of an answer, in powers of two tokens, before any has ended."""
TRUSTED_S, HALVED_S = 5.0, 5.0
"""What was measured longer ago counts less and less against a request: or one that is refused for it would never show
that it is wrong."""
IDLE_S = 0.25
"""The same of the pace of steps while nothing runs."""
FACTOR = (0.1, 1.5)
"""Bounds on what requests took against what was forecast; prompts that are cached take less."""
LONG, LONGER = 1.0, 2.0
"""Spreads above the usual length of an answer that must fit while a request waits, and for it to begin to wait: what is
kept short is the queue, not the answers, or steps would go to many that all end a little late."""
MARGIN = 1.1
"""What is forecast must fit into the time left so many times: steps and answers vary."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks of the engine. ``deadline`` is on the ``time.monotonic`` clock."""

    prompt: int
    """Tokens to read."""
    new: int = 0
    """Most tokens to make, one after the other."""
    deadline: float = inf
    is_exact: bool = False
    """Whether it makes so many whatever they are; others usually end earlier."""

    @property
    def cost(self) -> int:
        """What it counts in fair shares."""
        return self.prompt + self.new


@dataclass(slots=True, eq=False)
class EnginePlace:
    """A request in the engine, or one that was told to go there."""

    caller: str
    work: Work
    first_step: float
    """Of the engine, in which it has a slot: where it had to wait for one, that is a forecast."""
    steps: float
    """That it is expected to need."""
    rows: int
    """Requests in a step, when it came."""
    generated: int = 0
    """Tokens that it got."""
    is_cut: bool = True
    """Whether something else ended its answer than the answer."""
    seconds: float | None = None
    """What it took in the engine, once it is complete."""

    def note(self, chunk: StreamChunk) -> None:
        self.generated += len(chunk.tokens)
        if (done := chunk.completion) is not None:
            self.is_cut = done.finish_reason == "length"
            self.seconds = done.timings.total_s - done.timings.queue_s


@dataclass(slots=True)
class _Answers:
    """Of one caller. Lengths are powers of two, so that one answer of extreme length moves the mean by little."""

    length: float
    spread: float = 0.0
    factor: float = 1.0
    lessons: int = 0
    learned: float = -inf

    def learn(self, tokens: int, *, is_cut: bool, now: float) -> None:
        """An answer that was cut would have been longer: twice as long, say."""
        seen = max(log2(max(tokens, 1)) + 1, self.length) if is_cut else log2(max(tokens, 1))
        weight = max(WEIGHT, 1 / (self.lessons + 1))
        off = seen - self.length
        self.length += weight * off
        self.spread += WEIGHT * (abs(off) - self.spread) if self.lessons else 0.0
        self.lessons, self.learned = self.lessons + 1, now

    def note_time(self, ratio: float) -> None:
        least, most = FACTOR
        self.factor += WEIGHT * (min(max(ratio, least), most) - self.factor)


class Forecast:
    """One for all callers; lives on the event loop. ``now`` is always that loop's time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._by_caller: OrderedDict[str, _Answers] = OrderedDict()
        self._all = _Answers(TYPICAL)

    @property
    def _pace(self) -> StepPace:
        return self._engine.pace

    def place(self, caller: str, work: Work, rows: int, wait_s: float) -> EnginePlace:
        """Of a request that goes to the engine now, and will get a slot in so many seconds."""
        step_s = self._step_s(rows)
        steps = self.usual_s(caller, work, rows) / step_s if step_s else float(work.new)
        return EnginePlace(caller, work, self._pace.steps + (wait_s / step_s if step_s else 0.0), steps, rows)

    def left_s(self, places: Iterable[EnginePlace], rows: int) -> list[float]:
        """How long each will still hold its slot; one that takes longer than usual goes on for a quarter of that."""
        step_s, steps = self._step_s(rows), self._pace.steps
        return [
            max(place.first_step + place.steps - steps, min((steps - place.first_step) / 4, place.work.new), 0) * step_s
            for place in places
        ]

    def usual_s(self, caller: str, work: Work, rows: int) -> float:
        """What a request usually takes once it has a slot, in steps of so many requests."""
        answers = self._by_caller.get(caller, self._all)
        length = answers.length if answers.lessons else self._all.length
        tokens = work.new if work.is_exact else min(work.new, 2**length)
        return answers.factor * self._engine_s(work.prompt, tokens, rows)

    def longest_s(self, caller: str, work: Work, rows: int, now: float, spreads: float = 0.0) -> float:
        """The same with an answer so much longer than usual; less where lengths were learnt long ago, or never."""
        answers = self._by_caller.get(caller)
        if answers is None or not (answers.lessons or work.is_exact):
            return self._engine_s(work.prompt, work.new if work.is_exact else min(work.new, 1), rows)
        age = max(now - answers.learned - TRUSTED_S, 0.0) / HALVED_S
        tokens = (
            work.new if work.is_exact else min(work.new, 2 ** max(answers.length + spreads * answers.spread - age, 0.0))
        )
        return min(answers.factor, 1.0 if age else inf) * self._engine_s(work.prompt, tokens, rows)

    def trust(self, now: float) -> float:
        """In the measured pace of an engine in which nothing runs: 1, or less the longer nothing has run.

        That is soon, as trying costs nobody anything, and a pace that was measured in a bad moment would refuse all.
        """
        return float(0.5 ** (max(now - self._pace.measured - IDLE_S, 0.0) / IDLE_S))

    def learn(self, place: EnginePlace, now: float) -> None:
        """A request is done with the engine, complete or not."""
        work = place.work
        if not place.generated:
            return
        answers = self._by_caller.setdefault(place.caller, _Answers(TYPICAL))
        self._by_caller.move_to_end(place.caller)
        if len(self._by_caller) > MAX_REMEMBERED:
            self._by_caller.popitem(last=False)
        if not work.is_exact:
            answers.learn(place.generated, is_cut=place.is_cut, now=now)
            self._all.learn(place.generated, is_cut=place.is_cut, now=now)
        answers.learned = now
        if place.seconds is not None and (forecast := self._engine_s(work.prompt, place.generated, place.rows)):
            answers.note_time(place.seconds / forecast)

    def _engine_s(self, prompt: int, tokens: float, rows: int) -> float:
        """Its prompt is read beside the others' next tokens, and gives the first of its own."""
        return self._pace.step_s(prompt + rows) + max(tokens - 1, 0.0) * self._step_s(rows)

    def _step_s(self, rows: int) -> float:
        return self._pace.step_s(rows * self._pace.load)


class SlotTimes:
    """When slots become free, in seconds from now, as one request after the other takes the next."""

    def __init__(self, left_s: list[float], slots: int) -> None:
        """``left_s`` of those in the engine; where they are more than the slots, the earliest to end make room."""
        self._ends = heapq.nlargest(slots, left_s) if len(left_s) > slots else list(left_s)
        self._spare = slots - len(self._ends)
        heapq.heapify(self._ends)

    @property
    def next_s(self) -> float:
        return 0.0 if self._spare else self._ends[0]

    def take(self, seconds: float) -> None:
        """The next slot, for so long."""
        if self._spare:
            self._spare -= 1
            heapq.heappush(self._ends, seconds)
        else:
            heapq.heapreplace(self._ends, self._ends[0] + seconds)
