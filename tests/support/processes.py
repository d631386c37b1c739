"""Several processes on one machine, as torchrun would start them, without its seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

DEADLINE_S = 60.0

# Forked from a process that has imported everything: each is a real one, and none waits for imports.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["saeguard_sae.train.run.run", "transformers.models.llama.modeling_llama"])


class World:
    """Processes that find each other by a store in this one. What they write to standard error goes to one file."""

    def __init__(self, size: int, errors: Path, function: Callable[..., int | None], *given: Any) -> None:
        """Starts ``size`` of them, each with ``function(*given)``, whose number is the exit code."""
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._errors = errors
        self.processes: Sequence[BaseProcess] = [
            _processes.Process(
                target=_run, args=(rank, size, self._store.port, str(errors), function, given), daemon=True
            )
            for rank in range(size)
        ]
        for one in self.processes:
            one.start()

    def kill(self, rank: int) -> None:
        """With SIGKILL."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def codes(self) -> list[int | None]:
        """Waits until all have ended; None is one that did not, and is killed."""
        end = time.monotonic() + DEADLINE_S
        for one in self.processes:
            one.join(max(0.0, end - time.monotonic()))
        found = [one.exitcode for one in self.processes]
        for one in self.processes:
            one.kill()
        return found

    def said(self) -> list[str]:
        """Lines of their standard error."""
        return self._errors.read_text(encoding="utf-8").splitlines()


def _run(
    rank: int, size: int, port: int, errors: str, function: Callable[..., int | None], given: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    # A forked process has not opened its own: whatever writes to number 2 goes to the file.
    with open(errors, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    try:
        code = function(*given)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stderr.flush()
    sys.exit(code or 0)
