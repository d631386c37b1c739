"""One figure, one JSON line: both sides, their unit, the ratio that counts and whether it is what was aimed at."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable
from typing import Any

Line = dict[str, Any]


def figure(
    name: str,
    unit: str,
    ours: list[float],
    theirs: list[float],
    *,
    sides: tuple[str, str],
    target: str,
    more: Line | None = None,
) -> Line:
    """Prints the medians of both sides and ``ours / theirs``; every round is kept, so that the spread is visible.

    Args:
        target: such as ">= 0.95"; a figure with none is there to be known.
        more: whatever else belongs to it.
    """
    mine, other = statistics.median(ours), statistics.median(theirs)
    line: Line = {
        "figure": name,
        "unit": unit,
        sides[0]: _round(mine),
        sides[1]: _round(other),
        "ratio": _round(mine / other),
        "target": target,
        "met": met(mine / other, target),
        "rounds": {sides[0]: [_round(one) for one in ours], sides[1]: [_round(one) for one in theirs]},
    }
    return say(line | (more or {}))


def skipped(name: str, target: str, why: str) -> Line:
    """Prints that a figure was not measured."""
    return say({"figure": name, "target": target, "skipped": why})


def say(line: Line) -> Line:
    """Prints a line at once, and returns it."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    return line


def met(ratio: float, target: str) -> bool | None:
    """Whether the ratio is what the target asks for; None where it asks for nothing."""
    found = re.match(r"(>=|<=)\s*([0-9.]+)", target)
    if found is None:
        return None
    wanted = float(found[2])
    return ratio >= wanted if found[1] == ">=" else ratio <= wanted


def table(lines: Iterable[Line]) -> str:
    """What the lines say, for people: a figure in a row."""
    rows = [("figure", "ours", "beside", "ratio", "target", "")]
    rows += [_row(line) for line in lines if "figure" in line]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def _row(line: Line) -> tuple[str, str, str, str, str, str]:
    if "skipped" in line:
        return line["figure"], "", "", "", line["target"], f"skipped: {line['skipped']}"
    ours, theirs = (f"{line[side]:g} {line['unit']}" for side in line["rounds"])
    verdict = {True: "met", False: "MISSED", None: ""}[line.get("met")]
    return line["figure"], ours, theirs, f"{line['ratio']:g}", line["target"], verdict


def _round(value: float) -> float:
    return float(f"{value:.4g}")
