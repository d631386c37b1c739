"""What a sparse autoencoder is: torch only, no server and no wire."""

import os

# A thread of torch's that waits for the others keeps its core for a short while only: torch's OpenMP library reads this
# as it is loaded, and left alone, two trainings on the same cores took ten times as long as one, and not twice.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
