"""A plain table: ``index,label`` and any of ``maximum,density,label_score,label_metric``; empty cells say nothing."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from saeguard_sae.catalogue import BadCatalogue
from saeguard_sae.metadata.entries import Entry, Label, finite, index_of, share
from saeguard_sae.metadata.files import text_lines

NEEDED = ("index", "label")
OPTIONAL = ("maximum", "density", "label_score", "label_metric")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def entries(file: Path) -> Iterator[Entry]:
    """Every row of a file.

    Raises:
        BadCatalogue: an unknown or missing column, or a cell that cannot be; names file, line and column.
    """
    reader = csv.reader(text_lines(file), strict=True)
    rows = _rows(reader, file)
    header = next(rows, (1, []))[1]
    _check_header(header, f"{file}:1")
    for number, row in rows:
        where = f"{file}:{number}"
        if len(row) != len(header):
            raise BadCatalogue(f"{where}: {len(row)} cells, but the header has {len(header)}")
        yield _entry(dict(zip(header, row, strict=True)), where)


def _rows(reader: Iterator[list[str]], file: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, with the line they end on."""
    number = 0
    while True:
        try:
            row = next(reader, None)
        except csv.Error as err:
            raise BadCatalogue(f"{file}:{_line(reader, number)}: not CSV: {err}") from err
        number = _line(reader, number)
        if row is None:
            return
        if row:
            yield number, [cell.strip() for cell in row]


def _line(reader: object, otherwise: int) -> int:
    return int(getattr(reader, "line_num", otherwise))


def _check_header(header: list[str], where: str) -> None:
    for name in NEEDED:
        if name not in header:
            raise BadCatalogue(f"{where}: no column {name}; the header is {','.join(NEEDED)}[,{','.join(OPTIONAL)}]")
    for name in header:
        if name not in NEEDED + OPTIONAL:
            raise BadCatalogue(f"{where}: unknown column {name!r}; known are {', '.join(NEEDED + OPTIONAL)}")
        if header.count(name) > 1:
            raise BadCatalogue(f"{where}: column {name} twice")


def _entry(row: dict[str, str], where: str) -> Entry:
    maximum, density, score = (_number(row, name, where) for name in ("maximum", "density", "label_score"))
    metric = row.get("label_metric") or None
    if not row["label"] and (score is not None or metric):
        raise BadCatalogue(f"{where}: label: empty, but it has a score or a metric")
    return Entry(
        where=where,
        index=index_of(row["index"], where),
        labels=(Label(row["label"], score, metric),) if row["label"] else (),
        maximum=maximum,
        density=None if density is None else share(density, "density", where),
    )


def _number(row: dict[str, str], name: str, where: str) -> float | None:
    cell = row.get(name, "")
    if not cell:
        return None
    if not _NUMBER.fullmatch(cell):
        raise BadCatalogue(f"{where}: {name}: must be a number, got {cell[:40]!r}")
    return finite(float(cell), name, where)
