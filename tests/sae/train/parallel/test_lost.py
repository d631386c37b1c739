"""A process that is killed ends the run soon, with one message and a checkpoint that a run goes on from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saeguard_sae.train import parallel
from saeguard_sae.train.parallel import join_processes
from saeguard_sae.train.run.checkpoints import Checkpoints
from support.processes import DEADLINE_S, World

Tree = dict[str, Any]
GRACE_S = 0.5
GONE = "(counted from 0) is gone without a word: killed, out of memory, or its machine is lost"
AGAIN = "start the same command with --resume"


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it should have happened by now"
        time.sleep(0.02)


def sleep(ready: str) -> None:
    """As a process that waits for a GPU for ever."""
    parallel.GRACE_S = GRACE_S
    with join_processes(1, 96, "cpu", lambda: "all is kept") as mesh:
        Path(f"{ready}-{mesh.rank}").touch()
        time.sleep(DEADLINE_S)


def test_processes_that_hang_notice_too(tmp_path: Path) -> None:
    world = World(3, tmp_path / "errors", sleep, str(tmp_path / "ready"))
    wait(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(3)))
    world.kill(2)
    killed = time.monotonic()
    assert world.codes() == [1, 1, -signal.SIGKILL]
    assert time.monotonic() - killed < GRACE_S + 5
    (line,) = world.said()
    assert line == f"saeguard train: process 2 of 3 {GONE}; all is kept; {AGAIN}"


def worker(launcher: int, rank: int) -> int:
    """The process of that number which torchrun started."""
    for child in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"torchrun has no process {rank}")


def test_torchrun_ends_soon_with_a_message_and_a_checkpoint(tree: Tree, write: Callable[[Tree], Path]) -> None:
    tree["run"] |= {"tokens": 64 * 100_000, "checkpoint_every": 5}
    checkpoints = Checkpoints(Path(tree["run"]["out"]) / "checkpoints", 2)
    folder = Path(sys.executable).parent
    command = [folder / "torchrun", "--nproc-per-node", "2", "--no-python", folder / "saeguard", "train", write(tree)]
    quiet = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | quiet)
    wait(lambda: bool(checkpoints.paths()) or process.poll() is not None)
    os.kill(worker(process.pid, rank=1), signal.SIGKILL)
    killed = time.monotonic()
    said = process.communicate(timeout=DEADLINE_S)[1]
    assert time.monotonic() - killed < 20, said
    assert process.returncode == 1
    # torchrun ends the others too, and may be faster than the watch: then the process that missed an answer has told.
    told = [
        line for line in said.splitlines() if line.startswith("saeguard train: ") and checkpoints.resumable() in line
    ]
    whole = f"saeguard train: process 1 of 2 {GONE}; {checkpoints.resumable()}; {AGAIN}"
    assert told == [whole] or any("another process of this run no longer answers" in line for line in told), said
    begun = checkpoints.latest()
    assert begun is not None
    assert begun.step % 5 == 0
