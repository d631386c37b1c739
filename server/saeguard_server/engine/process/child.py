"""One engine process as its parent sees it: started, loaded, talked to, buried.

It is started as a program of its own, not forked and not through multiprocessing: neither this process' threads nor its
main module have to be fit for that. The pair of sockets is its only tie; when the parent goes away, the child reads the
end of it and exits.
"""

from __future__ import annotations

import logging
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from saeguard_server.engine.process import wire
from saeguard_server.engine.process.messages import Command, Ready, Refused, Report, Start, Stop
from saeguard_server.settings import BadSettings

_log = logging.getLogger(__name__)

STOP_S = 5.0
"""For a child that was asked to stop: the step it is in, and the last words of its requests."""
_EXIT_S = 1.0
"""For a child that closed its socket to be gone."""
_POLL_S = 0.5
"""How often a silent child is looked at: its own children may hold the socket open after its death."""


class Child:
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

    def load(self, start: Start) -> Ready:
        """Loads the engine, waiting for it.

        Raises:
            BadSettings: the process died, or its clock is not ours.
            Exception: what loading raised in the child.
        """
        asked = time.monotonic()
        try:
            wire.send(self._connection, start)
            answer = self._receive()
        except (EOFError, OSError) as err:
            raise BadSettings(f"engine.process: the engine's process {self._how_it_ended()} while it loaded") from err
        if isinstance(answer, Refused):
            raise answer.error
        assert isinstance(answer, Ready), "a child first says how loading went"
        if not asked <= answer.now <= time.monotonic():
            raise BadSettings("engine.process: the processes have different clocks, so that deadlines would not hold")
        self._writer.start()
        self._is_loaded = True
        return answer

    def send(self, command: Command) -> None:
        """Sends a command soon; to a child that died, never."""
        self._commands.put(command)

    def reports(self) -> Iterator[Report]:
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
        return wire.receive(self._connection)

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
                wire.send(self._connection, command)
            except OSError:
                return  # the reader sees the same end
