"""The engine as the server sees it, while another process runs it; a thread reads what that one says.

The front end holds the tokenizer and what is known of the SAEs, no weights. What requests share is touched on the event
loop only; the thread hands over to it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from saeguard.catalog import Model
from saeguard.results import ActivationPart, StreamChunk
from saeguard_server.engine.load import Backoff
from saeguard_server.engine.protocol import Capabilities, GenerateTask, InspectTask
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.engine.worker import messages
from saeguard_server.engine.worker.messages import (
    Cancel,
    Command,
    Event,
    Loader,
    RemoteSae,
    Start,
    StepOutput,
    Stop,
    Submit,
    SummedMetrics,
    WorkerFailure,
    WorkerReady,
    WorkerRefused,
)
from saeguard_server.errors import Unavailable
from saeguard_server.observe import Metrics
from saeguard_server.settings import BadSettings, Settings

# One engine process as its parent sees it: started, loaded, talked to, buried.
#
# It is started as a program of its own, not forked and not through multiprocessing: neither this process' threads nor
# its main module have to be fit for that. The pair of sockets is its only tie; when the parent goes away, the child
# reads the end of it and exits.


_log = logging.getLogger(__name__)

STOP_S = 5.0
"""For a child that was asked to stop: the step it is in, and the last words of its requests."""
_EXIT_S = 1.0
"""For a child that closed its socket to be gone."""
_POLL_S = 0.5
"""How often a silent child is looked at: its own children may hold the socket open after its death."""


class WorkerProcess:
    """A process that loads an engine and then runs it. ``load`` comes first; ``bury`` last, whatever happened."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # -P: what lies in the working directory is not imported.
            command = [sys.executable, "-P", "-m", __package__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
            self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        # Sent from a thread: a child that does not read must not hold up the event loop.
        self._writer = threading.Thread(target=self._write, name="engine-commands", daemon=True)
        self._is_loaded = False

    @property
    def pid(self) -> int:
        """The process' number."""
        return self._process.pid

    def load(self, start: Start) -> WorkerReady:
        """Loads the engine, waiting for it.

        Raises:
            BadSettings: the process died, or its clock is not ours.
            Exception: what loading raised in the child.
        """
        asked = time.monotonic()
        try:
            messages.send_message(self._connection, start)
            answer = self._receive()
        except (EOFError, OSError) as err:
            raise BadSettings(f"engine.process: the engine's process {self._how_it_ended()} while it loaded") from err
        if isinstance(answer, WorkerRefused):
            raise answer.error
        assert isinstance(answer, WorkerReady), "a child first says how loading went"
        if not asked <= answer.now <= time.monotonic():
            raise BadSettings("engine.process: the processes have different clocks, so that deadlines would not hold")
        self._writer.start()
        self._is_loaded = True
        return answer

    def send(self, command: Command) -> None:
        """Sends a command soon; to a child that died, never."""
        self._commands.put(command)

    def reports(self) -> Iterator[StepOutput]:
        """What it says, until it is gone."""
        try:
            while True:
                yield self._receive()
        except (EOFError, OSError):
            return
        except Exception:
            _log.exception("what the engine's process says cannot be read")

    def stop(self) -> None:
        """Asks it to end and waits for that; one that loads, or takes longer than ``STOP_S``, is killed."""
        if self._is_loaded:
            self.send(Stop())
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                _log.warning("the engine's process does not stop; it is killed", extra={"fields": {"pid": self.pid}})
        self._process.kill()
        self._process.wait()

    def bury(self) -> str:
        """Frees what it held, killing it if it still runs; says how it ended."""
        how = self._how_it_ended()
        if self._is_loaded:
            self._commands.put(None)
            self._writer.join(_EXIT_S)
        self._connection.close()
        return how

    def _receive(self) -> Any:
        while not self._connection.poll(_POLL_S):
            if self._process.poll() is not None:
                raise EOFError
        return messages.receive_message(self._connection)

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return "did not exit by itself"
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"

    def _write(self) -> None:
        while (command := self._commands.get()) is not None:
            try:
                messages.send_message(self._connection, command)
            except OSError:
                return  # the reader sees the same end


SILENCE_S = 10.0
"""A child reports every second; one that has not for this long is not ready, though nothing ends it."""
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.5, 30.0

_Inbox: TypeAlias = asyncio.Queue[Event]


def load_engine(settings: Settings, metrics: Metrics, load: Loader) -> WorkerEngine:
    """The engine that ``load`` makes, in a process of its own: loaded and checked there, not started.

    Raises:
        BadSettings: the process died while it loaded.
        Exception: what ``load`` raised, as it raised it.
    """
    return WorkerEngine(Start(settings, load), metrics)


class WorkerEngine:
    """An engine in another process, started again whenever that one ends."""

    def __init__(self, start: Start, metrics: Metrics) -> None:
        self._start = start
        self._child = WorkerProcess()
        self._load_s = 0.0
        self._ready = self._load(self._child)
        self._model = self._ready.model
        self._up: WorkerProcess | None = None
        """Where tasks go; none while there is no engine to take them."""
        self._is_well = True
        self._restarts, self._counts = metrics.engine_restarts, SummedMetrics(metrics)
        self._backoff = Backoff()
        self._heard = time.monotonic()
        self._uids = itertools.count()
        self._inboxes: dict[int, _Inbox] = {}
        self._sent = self._taken = self._waiting = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        """Held to replace the child, so that a stop ends the one there is and no other follows."""

    @property
    def model(self) -> Model:
        """The served model."""
        return self._model

    @property
    def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer."""
        return self._ready.tokenizer

    @property
    def saes(self) -> Mapping[str, RemoteSae]:
        """The served SAEs by name, without their weights."""
        return self._ready.saes

    @property
    def capabilities(self) -> Capabilities:
        """What the engine in the process can do."""
        return self._ready.capabilities

    @property
    def pid(self) -> int:
        """The number of the process that runs the engine."""
        return self._child.pid

    def is_ready(self) -> bool:
        """True while the process has an engine that takes tasks, and is heard of."""
        is_heard = time.monotonic() - self._heard < SILENCE_S
        return self._up is not None and self._is_well and is_heard and not self._stopping.is_set()

    def queued(self) -> int:
        """Tasks that wait for a slot as of the last report, and those it does not know of yet."""
        return self._waiting + self._sent - self._taken

    def start(self) -> None:
        """Listens to the process; call it on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._rise(self._child, self._ready.model)
        self._thread = threading.Thread(target=self._supervise, name="engine-process", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the process, by force after a while; whatever still runs fails with Unavailable. Idempotent."""
        with self._lock:
            is_first = not self._stopping.is_set()
            self._stopping.set()
        if not is_first:
            return
        self._child.stop()
        if self._thread is None or self._loop is None:
            self._child.bury()
            return
        self._thread.join()
        # After the last report, which may hold answers.
        self._loop.call_soon(self._lose, Unavailable("the server stopped"))

    async def generate(self, task: GenerateTask) -> AsyncGenerator[StreamChunk]:
        """Chunks as they come; closing the iterator cancels the task."""
        async with aclosing(self._events(task)) as events:
            async for event in events:
                assert isinstance(event, StreamChunk), "a generation gets chunks"
                yield event
                if event.completion is not None:
                    return

    async def inspect(self, task: InspectTask) -> AsyncGenerator[ActivationPart]:
        """Activations as they come; closing the iterator cancels the task."""
        async with aclosing(self._events(task)) as events:
            async for event in events:
                assert isinstance(event, ActivationPart), "an inspection gets activations"
                yield event

    async def _events(self, task: GenerateTask | InspectTask) -> AsyncGenerator[StreamChunk | ActivationPart]:
        child = self._up
        if child is None or not self.is_ready():
            raise Unavailable("the engine is not running", self._retry_s(0.0))
        uid, inbox = next(self._uids), _Inbox()
        self._inboxes[uid] = inbox
        self._sent += 1
        child.send(Submit(uid, task))
        try:
            while (event := await inbox.get()) is not None:
                if isinstance(event, WorkerFailure):
                    raise event.error()
                yield event
        finally:
            if self._inboxes.pop(uid, None) is not None:
                child.send(Cancel(uid))

    def _supervise(self) -> None:
        """The thread: one child after another."""
        while True:
            for report in self._child.reports():
                self._heard = time.monotonic()
                if report.counts is not None:
                    self._counts.update(report.counts)
                self._call(self._take, report)
            how = self._child.bury()
            self._counts.ended()
            if self._stopping.is_set() or not self._start_again(how):
                return

    def _start_again(self, how: str) -> bool:
        """Another child, however many starts it takes; False when it is time to stop."""
        wait_s = self._backoff.failed()
        self._call(self._lose, Unavailable("the engine's process ended; it starts again", self._retry_s(wait_s)))
        fields = {"pid": self._child.pid, "how": how, "next_start_s": wait_s}
        _log.error("the engine's process ended; its requests fail, and it starts again", extra={"fields": fields})
        while not self._stopping.wait(wait_s):
            if self._try():
                return True
            wait_s = self._backoff.failed()
        return False

    def _try(self) -> bool:
        """One start; True when it serves."""
        try:
            with self._lock:
                if self._stopping.is_set():
                    return False
                self._child = WorkerProcess()
            ready = self._load(self._child)
            if ready.differs_from(self._ready):
                raise BadSettings("the model or an SAE on disk is not what it was; start the server again to serve it")
        except Exception as err:
            self._child.bury()
            if not self._stopping.is_set():
                _log.error("the engine cannot be started again", extra={"fields": {"reason": str(err)}})
            return False
        self._restarts.inc()
        self._call(self._rise, self._child, ready.model)
        return True

    def _load(self, child: WorkerProcess) -> WorkerReady:
        began = time.monotonic()
        try:
            ready = child.load(self._start)
        except BaseException:  # an interrupt too: no child may be left behind
            child.stop()
            child.bury()
            raise
        self._load_s = time.monotonic() - began
        fields = {"pid": child.pid, "seconds": round(self._load_s, 2)}
        _log.info("the engine's process has loaded", extra={"fields": fields})
        return ready

    def _retry_s(self, wait_s: float) -> float:
        """When to come back: after the wait, and as long as loading took last time."""
        return min(max(wait_s + self._load_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    def _call(self, what: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None, "the thread starts with a loop"
        self._loop.call_soon_threadsafe(what, *arguments)

    # On the event loop.

    def _rise(self, child: WorkerProcess, model: Model) -> None:
        # Its context can be another one than before: what memory was free may decide it.
        self._up, self._is_well, self._model = child, True, model
        self._heard = time.monotonic()
        self._backoff.started()

    def _take(self, report: StepOutput) -> None:
        self._taken, self._waiting, self._is_well = report.taken, report.waiting, report.is_ready
        for uid, event in report.events:
            inbox = self._inboxes.get(uid)
            if inbox is None:
                continue  # cancelled while this was on its way
            inbox.put_nowait(event)
            if (
                event is None
                or isinstance(event, WorkerFailure)
                or (isinstance(event, StreamChunk) and event.completion)
            ):
                del self._inboxes[uid]

    def _lose(self, error: Unavailable) -> None:
        """The child is gone: every request fails by name."""
        self._up = None
        self._sent = self._taken = self._waiting = 0
        failed, self._inboxes = self._inboxes, {}
        for inbox in failed.values():
            inbox.put_nowait(WorkerFailure.of(error))
