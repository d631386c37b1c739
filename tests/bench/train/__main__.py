"""Trains SAEs beside SAELens, dictionary_learning and sparsify, each by its own trainer, and prints JSON lines.

Everybody trains on the same activations in the same order, in turn, each in a process of its own; ours with AuxK, the
tracked threshold and progress on. k = 32, batches of 4,096 tokens.

    make bench-train                                              everything, about a quarter of an hour
    make bench-train ARGS="--sizes 256x4096 --threads 1"
    make bench-train ARGS="--only sparsify --rounds 2 --steps 2"
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path

from bench.report import Line, say, table
from bench.train.case import Case, measure
from bench.train.options import Options, Size, parse
from bench.train.roster import Sides, versions

PACKAGES = {"torch", "sae-lens", "dictionary-learning", "eai-sparsify"}
COLUMNS = ("tokens_per_s", "seconds_per_step", "peak_mib", "fvu", "l0")


def main(given: Sequence[str] | None = None) -> None:
    """Runs what was asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that workers and files go with it
    options = parse(given, __doc__)
    lines = [say({"machine": machine(), "packages": packages()})]
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder))
        try:
            lines += _all(options, sides)
        finally:
            sides.stop()
    sys.stderr.write(described(lines) + "\n" + table(lines))


def _all(options: Options, sides: Sides) -> Iterable[Line]:
    for size in options.sizes:
        pool = _pool(size, sides.folder)
        for threads in options.threads:
            yield from measure(Case(size, threads, options.only, pool), sides)


def _pool(size: Size, folder: Path) -> str:
    path = str(folder / f"{size}.safetensors")
    command = [sys.executable, "-m", "bench.train.pools", path, str(size.d_in), str(size.pool)]
    subprocess.run(command, check=True)
    return path


def described(lines: Iterable[Line]) -> str:
    """What the sides need and where they got, for people."""
    rows = [("case", "side", *COLUMNS)]
    for line in lines:
        if "side" in line:
            cells = [f"{line[name]:g}" if name in line else "" for name in COLUMNS]
            rows.append((line["case"], line["side"], *cells, *([line["skipped"]] if "skipped" in line else [])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=False)) for row in rows)
    return "".join(f"{row.rstrip()}\n" for row in padded)


def machine() -> str:
    """Processor and cores."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def packages() -> dict[str, str]:
    """Versions of what is compared."""
    paths = [str(path) for venv in versions() for path in venv.glob("lib/python3*/site-packages")]
    found = {one.metadata["Name"]: one.version for one in distributions(path=paths)}
    return {name: found[name] for name in sorted(PACKAGES & found.keys())}


if __name__ == "__main__":
    main()
