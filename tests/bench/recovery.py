"""Trains SAEs on activations whose features are known, beside the libraries, and prints what each of them found.

Equal steps, batches, order, schedule and k; every learning rate of ``--rates`` is tried on every side, and each side's
best counts, by MMCS over all seeds. Truths are drawn with seeds that no trainer uses.

    python -m bench.recovery                                    both truths, three seeds, about 40 minutes
    python -m bench.recovery --truths toy --architectures topk --seeds 1 --steps 500
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from safetensors.torch import load_file

from bench.report import Line, figure, say, skipped, table
from bench.roster import Absent
from bench.train.pools import write
from bench.train.roster import LIBRARIES, OURS, Sides
from support.truth import Truth, compare, nested, toy

TRUTHS: dict[str, Callable[[int], Truth]] = {"toy": toy, "nested": nested}
K = {"toy": 5, "nested": 7}
"""About as many as truly fire on a token."""
D_SAE, BATCH, POOL, HELD_OUT = 256, 1024, 400, 8192
"""Batches of the pool, over and over; held-out tokens."""
ARCHITECTURES = ("topk", "batchtopk", "matryoshka")
WIDTHS = (D_SAE // 32, D_SAE // 8, D_SAE)
MEASURES = {"mmcs": ">= 1", "mcc": ">= 1", "f1": ">= 1", "fvu": "<= 1"}
"""And what ours should be beside the best library's."""
COLUMNS = ("mmcs", "found", "mcc", "f1", "fvu", "l0", "dead", "seconds")
"""Of every side, for people."""
SAVED = "saved.safetensors"


@dataclass(frozen=True)
class Options:
    """As given on the command line."""

    truths: tuple[str, ...]
    architectures: tuple[str, ...]
    seeds: int
    steps: int
    rates: tuple[float, ...]
    only: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One SAE of one side: what it found."""

    side: str
    rate: float
    found: dict[str, float]


def main(given: Sequence[str] | None = None) -> None:
    """Runs what was asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that workers and files go with it
    options = parse(given)
    lines: list[Line] = []
    rows = [("truth", "architecture", "side", "rate", *COLUMNS)]
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder))
        try:
            for truth in options.truths:
                measuring = Measuring(truth, options, sides)
                lines += measuring.lines()
                rows += measuring.rows()
        finally:
            sides.stop()
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        sys.stderr.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
    sys.stderr.write("\n" + table(lines))


class Measuring:
    """One truth: its worlds by seed, every run so far, and the sides that cannot take part."""

    def __init__(self, truth: str, options: Options, sides: Sides) -> None:
        self._truth, self._options, self._sides = truth, options, sides
        self._runs: dict[str, list[Run]] = {name: [] for name in options.architectures}
        self._absent: dict[str, str] = {}

    def lines(self) -> Iterator[Line]:
        """Prints every run, then ours beside the best library by architecture."""
        for seed in range(self._options.seeds):
            yield from self._world(seed)
        for architecture, runs in self._runs.items():
            yield from beside(f"{self._truth}, {architecture}", runs, self._absent)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Means over the seeds at the rate at which each side found most."""
        for architecture, runs in self._runs.items():
            for side in dict.fromkeys(run.side for run in runs):
                best = best_of(runs, side)
                means = (f"{_mean(best, name):.3f}" for name in COLUMNS)
                yield self._truth, architecture, side, f"{best[0].rate:g}", *means

    def _world(self, seed: int) -> Iterator[Line]:
        world = TRUTHS[self._truth](seed)
        train, _ = world.sample(BATCH * POOL, 10 * seed + 1)
        held_out, strength = world.sample(HELD_OUT, 10 * seed + 2)
        pool = self._sides.folder / f"{self._truth}.{seed}.safetensors"
        write(pool, train, held_out)
        for architecture, side, rate in product(self._runs, (OURS, *self._options.only), self._options.rates):
            if side in self._absent or (side == "sparsify" and architecture != "topk"):
                continue
            try:
                score = self._train(side, architecture, rate, seed, str(pool))
            except Absent as err:
                self._absent[side] = str(err)
                continue
            saved = load_file(self._sides.folder / SAVED)
            found = compare(saved["decoder"], world.directions, saved["features"], strength)
            score["dead"] = float((saved["features"] == 0).all(0).float().mean())
            self._runs[architecture].append(Run(side, rate, score | asdict(found)))
            yield self._said(architecture, seed, self._runs[architecture][-1])
        pool.unlink()

    def _train(self, side: str, architecture: str, rate: float, seed: int, pool: str) -> dict[str, float]:
        steps = self._options.steps
        self._sides.ask(
            side, "start", pool=pool, d_sae=D_SAE, k=K[self._truth], architecture=architecture,
            widths=WIDTHS if architecture == "matryoshka" else (), batch=BATCH, steps=steps, learning_rate=rate,
            warm_up=steps // 20, decay=steps // 5, seed=seed, precision="int8" if side == OURS else "float32",
        )  # fmt: skip
        seconds = self._sides.ask(side, "train", steps=steps)
        score = self._sides.ask(side, "save", path=str(self._sides.folder / SAVED))
        return {**score, "seconds": sum(seconds)}

    def _said(self, architecture: str, seed: int, run: Run) -> Line:
        line: Line = {"side": run.side, "truth": self._truth, "architecture": architecture, "seed": seed}
        return say(line | {"rate": run.rate} | {name: float(f"{value:.4g}") for name, value in run.found.items()})


def beside(name: str, runs: list[Run], absent: dict[str, str]) -> Iterator[Line]:
    """Prints our best rate beside that of the library that found most."""
    best = {side: best_of(runs, side) for side in dict.fromkeys(run.side for run in runs)}
    theirs = [side for side in best if side in LIBRARIES]
    if OURS not in best or not theirs:
        yield skipped(name, "", absent.get(OURS, "no library takes part"))
        return
    other = max(theirs, key=lambda side: _mean(best[side], "mmcs"))
    chosen = {side: {"rate": best[side][0].rate, "l0": round(_mean(best[side], "l0"), 3)} for side in (OURS, other)}
    for measure, target in MEASURES.items():
        ours, others = ([run.found[measure] for run in best[side]] for side in (OURS, other))
        more: Line = {"chosen": chosen}
        yield figure(f"{name}: {measure}", "", ours, others, sides=(OURS, other), target=target, more=more)


def best_of(runs: list[Run], side: str) -> list[Run]:
    """Of the rate at which the side found most."""
    rates = dict.fromkeys(run.rate for run in runs if run.side == side)
    by_rate = [[run for run in runs if (run.side, run.rate) == (side, rate)] for rate in rates]
    return max(by_rate, key=lambda some: _mean(some, "mmcs"))


def _mean(runs: list[Run], name: str) -> float:
    return statistics.fmean(run.found[name] for run in runs)


def parse(given: Sequence[str] | None) -> Options:
    """From the command line; ends the program with a message where something is not one of what is allowed."""
    parser = argparse.ArgumentParser(
        prog="bench.recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--truths", default=",".join(TRUTHS), help=f"some of {', '.join(TRUTHS)}")
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES), help="some of the default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rates", default="0.003,0.01", help="learning rates; 0 is a side's own")
    parser.add_argument("--only", default=",".join(LIBRARIES), help="libraries beside ours, some of the default")
    args = parser.parse_args(given)
    for name, value, allowed in (
        ("--truths", args.truths, TRUTHS),
        ("--architectures", args.architectures, ARCHITECTURES),
        ("--only", args.only, LIBRARIES),
    ):
        for one in filter(None, value.split(",")):
            if one not in allowed:
                parser.error(f"{name}: {one!r} is not one of {', '.join(allowed)}")
    if not 1 <= args.seeds <= 20 or args.steps < 40:
        parser.error("--seeds must be 1 to 20, --steps 40 or more")
    rates = tuple(float(one) for one in args.rates.split(","))
    return Options(
        tuple(args.truths.split(",")),
        tuple(args.architectures.split(",")),
        args.seeds,
        args.steps,
        rates,
        tuple(filter(None, args.only.split(","))),
    )


if __name__ == "__main__":
    main()
