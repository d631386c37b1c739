"""What a sparse autoencoder is: torch only, no server and no wire."""

import os

# torch's OpenMP library reads it as it is loaded. Without it a thread that waits for the others keeps its core for some
# 20 ms, so that two processes on the same cores take ten times as long as they need, and not twice.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
