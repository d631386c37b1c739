"""The engine as the server sees it, while another process runs it; a thread reads what that one says.

The front holds the tokenizer and what is known of the SAEs, no weights. What requests share is touched on the event
loop only; the thread hands over to it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from saeguard.catalog import Model
from saeguard_server.engine.front import Backoff, Command, EngineFront, Shutdown
from saeguard_server.engine.pace import StepPace
from saeguard_server.engine.worker import messages
from saeguard_server.errors import Unavailable
from saeguard_server.observe import Metrics
from saeguard_server.settings import BadSettings, Settings

_log = logging.getLogger(__name__)

STOP_S = 5.0
"""For a process that was asked to stop: the step it is in, and the last words of its requests."""
SILENCE_S = 10.0
"""A process reports every second; one that has not for this long is not ready, though nothing ends it."""
_EXIT_S = 1.0
"""For a process that closed its socket to be gone."""
_POLL_S = 0.5
"""How often a silent process is looked at: its own children may hold the socket open after its death."""
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.5, 30.0


class WorkerProcess:
    """A process that loads an engine and then runs it. ``load`` comes first; ``join`` last, whatever happened.

    It is a program of its own, not forked and not started by multiprocessing: neither this process' threads nor its
    main module have to be fit for that. The pair of sockets is its only tie; it exits when the other end is gone.
    """

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
        return self._process.pid

    def load(self, start: messages.Start) -> messages.WorkerReady:
        """Loads the engine, waiting for it; raises what loading raised in the child, or BadSettings."""
        began = time.monotonic()
        try:
            messages.send_message(self._connection, start)
            answer = self._receive()
        except (EOFError, OSError) as err:
            raise BadSettings(f"engine.process: the engine's process {self._how_it_ended()} while it loaded") from err
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, messages.WorkerReady), "a child first says how loading went"
        if not began <= answer.now <= time.monotonic():
            raise BadSettings("engine.process: the processes have different clocks, so that deadlines would not hold")
        self._writer.start()
        self._is_loaded = True
        return answer

    def send(self, command: Command) -> None:
        """Sends a command soon; to a child that died, never."""
        self._commands.put(command)

    def outputs(self) -> Iterator[messages.StepOutput]:
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
            self.send(Shutdown())
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                _log.warning("the engine's process does not stop; it is killed", extra={"fields": {"pid": self.pid}})
        self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        self._process.kill()

    def join(self) -> str:
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


def load_engine(settings: Settings, metrics: Metrics, load: messages.Loader) -> WorkerEngine:
    """The engine that ``load`` makes, in a process of its own, not started; raises what that raised, or BadSettings."""
    return WorkerEngine(messages.Start(settings, load), metrics)


class WorkerEngine(EngineFront):
    """An engine in another process, started again whenever that one ends."""

    def __init__(self, start: messages.Start, metrics: Metrics) -> None:
        super().__init__(start.settings.engine.step_timeout_s)
        self._start = start
        self._process = WorkerProcess()
        self._load_s = 0.0
        self._ready = ready = self._load(self._process)
        self.model, self.tokenizer, self.saes = ready.model, ready.tokenizer, ready.saes
        self.capabilities, self.pace = ready.capabilities, StepPace()
        self._up: WorkerProcess | None = None
        """Where tasks go; none while there is no engine to take them."""
        self._is_well = True
        self._restarts, self._counts = metrics.engine_restarts, messages.SummedMetrics(metrics)
        self._backoff = Backoff()
        self._last_output = time.monotonic()
        self._waiting = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        """Taken to replace the process, so that a stop ends the one there is and no other follows."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_ready(self) -> bool:
        is_silent = time.monotonic() - self._last_output >= SILENCE_S
        return self._up is not None and self._is_well and not is_silent and not self._stopping.is_set()

    def queued(self) -> int:
        return self._waiting + self._submitted - self._taken

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rise(self._process, self._ready.model)
        self._thread = threading.Thread(target=self._supervise, name="engine-process", daemon=True)
        self._thread.start()
        self._look()

    def stop(self) -> None:
        with self._lock:
            is_first = not self._stopping.is_set()
            self._stopping.set()
        if not is_first:
            return
        self._look_no_more()
        self._process.stop()
        if self._thread is None or self._loop is None:
            self._process.join()
            return
        self._thread.join()
        # After the last report, which may hold answers.
        self._loop.call_soon(self._lose, Unavailable("the server stopped"))

    def _send(self, command: Command) -> None:
        if self._up is not None:
            self._up.send(command)

    def _heard(self) -> object:
        return self._last_output

    def _note_hung(self, *, is_hung: bool) -> None:
        """Whoever reads from the process sees its end, and starts another."""
        if is_hung and self._up is not None:
            _log.error("the engine's process hangs; it is killed", extra={"fields": {"pid": self._up.pid}})
            self._up.kill()
            self._up = None

    def _supervise(self) -> None:
        while True:
            for output in self._process.outputs():
                self._last_output = time.monotonic()
                if output.counts is not None:
                    self._counts.update(output.counts)
                self._call(self._take, output)
            how = self._process.join()
            self._counts.ended()
            if self._stopping.is_set() or not self._start_again(how):
                return

    def _start_again(self, how: str) -> bool:
        """Another process, however many starts it takes; False when it is time to stop."""
        wait_s = self._backoff.failed()
        self._call(self._lose, Unavailable("the engine's process ended; it starts again", self._retry_s(wait_s)))
        fields = {"pid": self._process.pid, "how": how, "next_start_s": wait_s}
        _log.error("the engine's process ended; its requests fail, and it starts again", extra={"fields": fields})
        while not self._stopping.wait(wait_s):
            if self._try():
                return True
            wait_s = self._backoff.failed()
        return False

    def _try(self) -> bool:
        try:
            with self._lock:
                if self._stopping.is_set():
                    return False
                self._process = WorkerProcess()
            ready = self._load(self._process)
            if ready.identity != self._ready.identity:
                raise BadSettings("the model or an SAE on disk is not what it was; start the server again to serve it")
        except Exception as err:
            self._process.join()
            if not self._stopping.is_set():
                _log.error("the engine cannot be started again", extra={"fields": {"reason": str(err)}})
            return False
        self._restarts.inc()
        self._call(self._rise, self._process, ready.model)
        return True

    def _load(self, process: WorkerProcess) -> messages.WorkerReady:
        began = time.monotonic()
        try:
            ready = process.load(self._start)
        except BaseException:  # an interrupt too: no process may be left behind
            process.stop()
            process.join()
            raise
        self._load_s = time.monotonic() - began
        fields = {"pid": process.pid, "seconds": round(self._load_s, 2)}
        _log.info("the engine's process has loaded", extra={"fields": fields})
        return ready

    def _retry_s(self, wait_s: float = 0.0) -> float:
        """When to come back: after the wait, and as long as loading took last time."""
        return min(max(wait_s + self._load_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    def _call(self, what: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None, "the thread starts with a loop"
        self._loop.call_soon_threadsafe(what, *arguments)

    # On the event loop.

    def _rise(self, process: WorkerProcess, model: Model) -> None:
        # Its context can be another one than before: what memory was free may decide it.
        self._up, self._is_well, self.model = process, True, model
        self._last_output = time.monotonic()
        self._backoff.started()

    def _take(self, output: messages.StepOutput) -> None:
        self._taken, self._waiting, self._is_well = output.taken, output.waiting, output.is_ready
        self.pace = output.pace
        self._hand_out(output.events)

    def _lose(self, error: Unavailable) -> None:
        """The process is gone: every request fails by name."""
        self._up, self.pace = None, StepPace()
        self._submitted = self._taken = self._waiting = 0
        self._fail_all(error)
