"""Two texts side by side, and tables: lines are folded and padded by terminal cells, not by characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from saeguard_client.cli.terminal import cells

_GAP = " | "


def beside(left: str, right: str, width: int) -> Iterator[str]:
    """Lines of at most ``width`` cells with ``left`` and ``right`` folded into halves."""
    half = (width - len(_GAP)) // 2
    for a, b in zip_longest(fold(left, half), fold(right, half), fillvalue=""):
        yield f"{pad(a, half)}{_GAP}{b}".rstrip()


def fold(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` cells, broken at spaces where there are any."""
    return [line for paragraph in text.expandtabs(4).split("\n") for line in _fold_line(paragraph, width)]


def pad(text: str, width: int) -> str:
    """``text`` and the spaces that fill ``width`` cells."""
    return text + " " * (width - cells(text))


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows with columns aligned; the last column is as long as it is."""
    widths = [max(cells(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(pad(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _fold_line(line: str, width: int) -> Iterator[str]:
    while cells(line) > width:
        cut = _cut(line, width)
        yield line[:cut].rstrip()
        line = line[cut:].lstrip(" ")
    yield line


def _cut(line: str, width: int) -> int:
    """Index at which to break: after the last space that fits, else after the last character that fits."""
    end, used = 0, 0
    while used + cells(line[end]) <= width:
        used += cells(line[end])
        end += 1
    space = line.rfind(" ", 1, end + 1)
    return max(space if space > 0 else end, 1)
