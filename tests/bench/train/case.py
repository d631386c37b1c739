"""One size with one number of threads: every side in every round, and the figures that come of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.report import Line, figure, say, skipped
from bench.roster import Absent
from bench.rounds import Rounds, interleave
from bench.train.options import Size
from bench.train.roster import FLOOR, OURS, Sides
from bench.train.side import middle

BATCH, K = 4096, 32
SHORT = {"bfloat16": "bf16", "float32": "fp32"}
"""Precisions of everybody."""
BEST = f"{OURS}, topk int8"
"""Ours as it comes: the product that proposes in int8, everything after it in float32."""
MORE = {f"{OURS}, {architecture} int8": architecture for architecture in ("batchtopk", "matryoshka")}
WIDTHS = (4, 2, 1)
"""A matryoshka's levels, as divisors of the number of features."""


@dataclass
class Case:
    """What is measured.

    Attributes:
        libraries: that take part beside ours.
        found: seconds a step of each side, by round.
        scores: what each side says at the end.
    """

    size: Size
    threads: int
    libraries: tuple[str, ...]
    pool: str
    found: Rounds = field(default_factory=Rounds)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.size}, {self.threads} thread{'s' * (self.threads > 1)}"

    def plans(self) -> dict[str, dict[str, Any]]:
        """By side."""
        plans = {FLOOR: self._plan("topk", "bfloat16")}
        for precision, short in SHORT.items():
            plans[f"{OURS}, topk {short}"] = self._plan("topk", precision)
            for library in self.libraries:
                plans[f"{library}, topk {short}"] = self._plan("topk", precision)
        own = {BEST: "topk", **MORE}
        return plans | {name: self._plan(architecture, "int8") for name, architecture in own.items()}

    def _plan(self, architecture: str, precision: str) -> dict[str, Any]:
        """With everyone's own optimiser and learning rate, but without a schedule: equal steps are equal chances."""
        widths = [self.size.d_sae // part for part in WIDTHS] if architecture == "matryoshka" else []
        return {
            "pool": self.pool, "d_sae": self.size.d_sae, "k": K, "architecture": architecture, "widths": widths,
            "precision": precision, "threads": self.threads, "batch": BATCH, "steps": self.size.steps,
            "learning_rate": 0.0, "seed": 11,
        }  # fmt: skip


def measure(case: Case, sides: Sides) -> Iterator[Line]:
    """Prints its figures."""
    plans = case.plans()
    case.found = interleave({name: _side(case, sides, name, plan) for name, plan in plans.items()}, case.size.rounds)
    for name in plans:
        if name not in case.found.absent:
            try:
                case.scores[name] = sides.ask(name, "score")
            except Absent as err:
                case.found.absent[name] = str(err)
        yield _described(case, name)
    yield from figures(case)


def _side(case: Case, sides: Sides, name: str, plan: Mapping[str, Any]) -> Any:
    def seconds(turn: int) -> float:
        if turn == 0:
            sides.ask(name, "start", **plan)
        return middle(sides.ask(name, "train", steps=case.size.each if turn else 1))

    return seconds


def _described(case: Case, name: str) -> Line:
    """Prints what a side needs and where it got."""
    line: Line = {"side": name, "case": str(case)}
    if name in case.found.absent:
        return say(line | {"skipped": case.found.absent[name]})
    seconds = statistics.median(case.found.values[name])
    speed = {"seconds_per_step": float(f"{seconds:.4g}"), "tokens_per_s": float(f"{BATCH / seconds:.4g}")}
    return say(line | speed | {key: float(f"{value:.4g}") for key, value in case.scores[name].items()})


def figures(case: Case) -> Iterator[Line]:
    """Prints the ratios."""
    theirs = [name for name in case.scores if name.partition(",")[0] in case.libraries]
    beside = f"{case}: tokens a second beside the best library"
    if not theirs or BEST not in case.scores:
        yield skipped(beside, ">= 4", case.found.absent.get(BEST, "no library takes part"))
        return
    for short in SHORT.values():
        same = [name for name in theirs if name.endswith(short)]
        ours = f"{OURS}, topk {short}"
        if same and ours in case.scores:
            yield _speed(case, f"{beside} at {short}", ours, fastest(case, same), "")
    best = fastest(case, theirs)
    yield _speed(case, beside, BEST, best, ">= 4")
    for ours, architecture in MORE.items():
        if ours in case.scores:
            yield _speed(case, f"{beside}, {architecture}", ours, best, "")
    if FLOOR in case.scores:
        seconds = case.found.values
        name = f"{case}: seconds a step beside the floor"
        yield figure(name, "s", seconds[BEST], seconds[FLOOR], sides=(BEST, FLOOR), target="<= 2")
    lowest = min(theirs, key=lambda one: case.scores[one]["fvu"])
    loss = {one: [case.scores[one]["fvu"]] for one in (BEST, lowest)}
    name = f"{case}: held-out FVU after {case.size.steps} steps"
    yield figure(name, "", loss[BEST], loss[lowest], sides=(BEST, lowest), target="")


def fastest(case: Case, names: list[str]) -> str:
    """The side with the shortest step."""
    return min(names, key=lambda one: statistics.median(case.found.values[one]))


def _speed(case: Case, name: str, ours: str, theirs: str, target: str) -> Line:
    rates = {one: [BATCH / seconds for seconds in case.found.values[one]] for one in (ours, theirs)}
    return figure(name, "tokens/s", rates[ours], rates[theirs], sides=(ours, theirs), target=target)
