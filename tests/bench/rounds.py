"""Every side in every round, in turn, so that a busy machine hits them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.report import Line, figure, skipped
from bench.roster import Absent

Measure = Callable[[int], float]
"""Measures one round, given its number; may raise ``Absent``."""


@dataclass
class Rounds:
    """What each side measured in each round, and why some took no part."""

    values: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def compare(self, name: str, unit: str, ours: str, theirs: str, target: str) -> Line:
        """Prints a figure of two sides, or that one of them is missing."""
        for side in (ours, theirs):
            if side in self.absent:
                return skipped(name, target, self.absent[side])
        return figure(name, unit, self.values[ours], self.values[theirs], sides=(ours, theirs), target=target)


def interleave(sides: Mapping[str, Measure], rounds: int) -> Rounds:
    """Measures every side ``rounds`` times, after one round that only warms up; every other round goes backwards."""
    found = Rounds({name: [] for name in sides})
    for turn in range(rounds + 1):
        order = list(sides) if turn % 2 else list(sides)[::-1]
        for name in order:
            if name not in found.absent:
                _measure(found, name, sides[name], turn)
    return found


def _measure(found: Rounds, name: str, side: Measure, turn: int) -> None:
    try:
        value = side(turn)
    except Absent as err:
        found.absent[name] = str(err)
        return
    if turn:
        found.values[name].append(value)
