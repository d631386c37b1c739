"""What must be settled for the whole process before torch is loaded."""

from __future__ import annotations

import os


def let_waiting_threads_go() -> None:
    """A thread of torch's that waits for the others keeps its core for half a millisecond, unless the environment says
    something else. torch's OpenMP library reads this as it is loaded; left alone it would be some 20 ms, so that two
    processes on the same cores take ten times as long as they need, and not twice."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
