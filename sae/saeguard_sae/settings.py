"""What must be settled for the whole process before torch is loaded."""

from __future__ import annotations

import os


def limit_openmp_spinning() -> None:
    """A thread of torch's that waits for the others keeps its core for a short while only, unless the environment says
    something else. torch's OpenMP library reads this as it is loaded; left alone, two trainings on the same cores took
    ten times as long as one, and not twice."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
