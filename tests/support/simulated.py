"""An engine, callers and a clock that are simulated: minutes of traffic in a moment, the same every time."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from saeguard_server.engine.pace import StepPace
from saeguard_server.errors import Overloaded
from saeguard_server.fair_queue import FairQueue
from saeguard_server.forecast import Work
from saeguard_server.observe import Metrics

T = TypeVar("T")


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is that of the next thing to happen, never of a clock."""

    def __init__(self) -> None:
        super().__init__()
        self._simulated = 1000.0

    def time(self) -> float:
        return self._simulated

    def _run_once(self) -> None:
        due = [timer._when for timer in self._scheduled if not timer._cancelled]
        if due and not self._ready:
            self._simulated = max(self._simulated, min(due))
        super()._run_once()


def simulate(test: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(test)


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(eq=False)
class Running:
    prompt: int
    left: int
    deadline: float
    done: asyncio.Future[bool]
    made: int = 0
    started: float = 0.0


@dataclass
class SimulatedEngine:
    """First come, first served over ``slots``; a step takes ``fixed_s``, and ``token_s`` for each token."""

    slots: int = 16
    fixed_s: float = 0.010
    token_s: float = 0.0005
    chunk: int = 256
    noise: float = 0.1
    slow: float = 1.0
    """Factor on every step."""
    pace: StepPace = field(default_factory=StepPace)
    waiting: deque[Running] = field(default_factory=deque)
    inside: list[Running] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seed: int = 1
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def queued(self) -> int:
        return len(self.waiting)

    def submit(self, prompt: int, new: int, deadline: float) -> Running:
        request = Running(prompt, new, deadline, asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return request

    def cancel(self, request: Running) -> None:
        for group in (self.waiting, self.inside):
            if request in group:
                group.remove(request)

    async def _run(self) -> None:
        while self.waiting or self.inside:
            self._expire()
            while self.waiting and len(self.inside) < self.slots:
                self.inside.append(self.waiting.popleft())
                self.inside[-1].started = now()
            if not self.inside:
                return
            batch, budget, read, parts = list(self.inside), self.chunk, 0, {}
            for request in batch:
                parts[request] = part = min(request.prompt, budget)
                budget -= part
                read += part or (0 if request.prompt else 1)
            seconds = self.slow * (self.fixed_s + self.token_s * read) * (1 + self.random.uniform(0, self.noise))
            await asyncio.sleep(seconds)
            self.pace.note(len(batch), max(read, 1), seconds, now())
            self.steps += 1
            for request in batch:
                request.prompt -= parts[request]
                if not request.prompt and request in self.inside:
                    request.made += 1
                    request.left -= 1
                    if request.left <= 0:
                        self.inside.remove(request)
                        self._end(request, True)

    def _expire(self) -> None:
        for request in [*self.waiting, *self.inside]:
            if request.deadline <= now():
                self.cancel(request)
                self._end(request, False)

    @staticmethod
    def _end(request: Running, is_complete: bool) -> None:
        if not request.done.done():
            request.done.set_result(is_complete)


@dataclass
class Outcomes:
    """What became of one caller's requests."""

    complete: int = 0
    late: int = 0
    refused: int = 0
    tokens: int = 0
    retries_s: list[float] = field(default_factory=list)
    refusals_s: list[float] = field(default_factory=list)
    """How long each refusal took."""


class Traffic:
    """Callers at a simulated engine behind a fair queue."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.turns = FairQueue(engine, Metrics(CollectorRegistry()), engine.slots)  # type: ignore[arg-type]
        self.of: dict[str, Outcomes] = {}
        self._tasks: set[asyncio.Task[bool]] = set()

    def ask(
        self, caller: str, prompt: int, length: int, within_s: float = inf, *, most: int | None = None
    ) -> asyncio.Task[bool]:
        """A request that will make ``length`` tokens, under a limit of ``most``; True where it is complete in time."""
        task = asyncio.create_task(self._ask(caller, prompt, length, within_s, most))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask(self, caller: str, prompt: int, length: int, within_s: float, most: int | None) -> bool:
        outcomes, began = self.of.setdefault(caller, Outcomes()), now()
        work = Work(prompt, most or length, began + within_s, is_exact=most is None)
        try:
            async with asyncio.timeout(None if within_s == inf else within_s), self.turns.turn(caller, work) as place:
                request = self.engine.submit(prompt, length, work.deadline)
                try:
                    is_complete = await request.done
                finally:
                    self.engine.cancel(request)
                    place.generated = request.made
                place.is_cut = not is_complete
                place.seconds = now() - request.started if is_complete else None
        except Overloaded as err:
            outcomes.refused += 1
            outcomes.retries_s.append(err.retry_after_s or 0.0)
            outcomes.refusals_s.append(now() - began)
            return False
        except TimeoutError:
            is_complete = False
        if is_complete:
            outcomes.complete += 1
            outcomes.tokens += length
        else:
            outcomes.late += 1
        return is_complete

    async def all_done(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
