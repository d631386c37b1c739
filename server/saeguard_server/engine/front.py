"""The front of an engine whose core runs on a thread or in a process: tasks go out under numbers, events come back."""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from saeguard.results import ActivationPart, StreamChunk
from saeguard_server.engine.pace import LOOK_S, StepWatch
from saeguard_server.engine.protocol import Engine, Event, GenerateTask, InspectTask
from saeguard_server.errors import RETRY_S, ServiceError, Unavailable

FIRST_S, LONGEST_S = 0.5, 30.0
GOOD_SERVICE_S = 60.0
"""An engine that ran this long has recovered."""

_Inbox: TypeAlias = asyncio.Queue[Event | None]


@dataclass(frozen=True, slots=True)
class Submit:
    """A task under the number that its events will have."""

    uid: int
    task: GenerateTask | InspectTask


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this task's events any more."""

    uid: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End everything that still runs, and yourself."""


Command: TypeAlias = Submit | Cancel | Shutdown


class EngineFront(Engine):
    """Hands tasks to a core and its events to their owners; everything here happens on the event loop."""

    def __init__(self, step_timeout_s: float) -> None:
        self._watch = StepWatch(step_timeout_s)
        self._next_look: asyncio.TimerHandle | None = None
        self._uids = itertools.count()
        self._inboxes: dict[int, _Inbox] = {}
        self._submitted = self._taken = 0
        """Tasks that were handed to the core, and that it has taken."""

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Hands a command to the core."""

    @abstractmethod
    def _note_hung(self, *, is_hung: bool) -> None:
        """Told again and again whether a step takes too long."""

    def _heard(self) -> object:
        """What changes whenever the core says something; None where it says nothing between steps."""
        return None

    def _look(self) -> None:
        """Begins to look whether a step hangs."""
        self._note_hung(is_hung=self._watch.is_hung(self.pace, self._heard()))
        self._next_look = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _look_no_more(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()

    def _retry_s(self) -> float:
        """When to come back to an engine that is not ready."""
        return RETRY_S

    async def events(self, task: GenerateTask | InspectTask) -> AsyncGenerator[StreamChunk | ActivationPart]:
        if not self.is_ready():
            raise Unavailable("the engine is not running", self._retry_s())
        uid, inbox = next(self._uids), _Inbox()
        self._inboxes[uid] = inbox
        self._submitted += 1
        self._send(Submit(uid, task))
        try:
            while (event := await inbox.get()) is not None:
                if isinstance(event, ServiceError):
                    raise event
                yield event
                if ends_task(event):
                    return
        finally:
            if self._inboxes.pop(uid, None) is not None:
                self._send(Cancel(uid))

    def _hand_out(self, events: Iterable[tuple[int, Event | None]]) -> None:
        """The core's events to their owners; those of a task that was cancelled meanwhile go nowhere."""
        for uid, event in events:
            if uid in self._inboxes:
                self._inboxes[uid].put_nowait(event)
                if ends_task(event):
                    del self._inboxes[uid]

    def _fail_all(self, error: ServiceError) -> None:
        self._hand_out([(uid, error) for uid in self._inboxes])


def ends_task(event: Event | None) -> bool:
    if isinstance(event, StreamChunk):
        return event.completion is not None
    return not isinstance(event, ActivationPart)


class Backoff:
    """Waits before each start: none before the first, then half a second, doubled each time, up to half a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._started: float | None = None

    def started(self) -> None:
        self._started = self._clock()

    def failed(self) -> float:
        """Notes a failure, of a running engine or of a start -> seconds to wait before the next start."""
        if self._started is not None and self._clock() - self._started >= GOOD_SERVICE_S:
            self._failures = 0
        self._failures, self._started = self._failures + 1, None
        doublings = min(self._failures - 2, 10)  # 2 ** n overflows a float at last
        return 0.0 if self._failures == 1 else min(FIRST_S * 2.0**doublings, LONGEST_S)
