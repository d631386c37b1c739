"""The parent's side: starts workers, asks them, ends them. Whatever is wrong with one has a reason in one line."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.worker import REPLIES

START_S = 300.0
ASK_S = 300.0
END_S = 15.0


class WorkerFailed(RuntimeError):
    """A worker that did not start, died, took too long or said that it could not; the message says which."""


class Worker:
    """A running worker.

    Args:
        log: where its own output goes.

    Raises:
        WorkerFailed: it did not get ready.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment, REPLIES: str(writing)},
                pass_fds=(writing,),
                start_new_session=True,  # so that what it starts ends with it
                text=True,
            )
        os.close(writing)
        self._replies, self._read = reading, b""
        try:
            self.ops = frozenset(self._reply(START_S))
        except WorkerFailed:
            self.stop()
            raise

    def ask(self, op: str, **arguments: Any) -> Any:
        """What the worker found.

        Raises:
            WorkerFailed: it could not.
        """
        if self._replies < 0:
            raise WorkerFailed("was ended")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as err:
            raise WorkerFailed(self._why("is gone")) from err
        return self._reply(ASK_S)

    def stop(self) -> None:
        """Ends it, by force where it does not end by itself. Idempotent."""
        if self._replies < 0:
            return
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._replies)
        self._replies = -1

    def _reply(self, within_s: float) -> Any:
        until = time.monotonic() + within_s
        while b"\n" not in self._read:
            if time.monotonic() > until:
                raise WorkerFailed(self._why(f"said nothing for {within_s:.0f} s"))
            if select.select([self._replies], [], [], 1.0)[0]:
                if not (more := os.read(self._replies, 65_536)):
                    raise WorkerFailed(self._why("ended"))
                self._read += more
            elif self._process.poll() is not None:
                raise WorkerFailed(self._why("ended"))
        line, _, self._read = self._read.partition(b"\n")
        found = json.loads(line)
        if "error" in found:
            raise WorkerFailed(found["error"])
        return found["ok"]

    def _why(self, what: str) -> str:
        """With the last words of its log."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{what}: {lines[-1][:200]}" if lines else what
