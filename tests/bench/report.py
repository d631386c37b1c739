"""One figure, one JSON line: both sides, their unit, and the ratio that counts."""

from __future__ import annotations

import json
import statistics
import sys


def figure(
    name: str, unit: str, ours: list[float], theirs: list[float], *, sides: tuple[str, str], target: str
) -> None:
    """Prints the medians of both sides and ``ours / theirs``; every round is kept, so that the spread is visible."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    line = {
        "figure": name,
        "unit": unit,
        sides[0]: _round(mine),
        sides[1]: _round(other),
        "ratio": _round(mine / other),
        "target": target,
        "rounds": {sides[0]: [_round(one) for one in ours], sides[1]: [_round(one) for one in theirs]},
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _round(value: float) -> float:
    return float(f"{value:.4g}")
