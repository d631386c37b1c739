"""Texts in plain and JSONL files, as they are, and one text in a record."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec

from saeguard_sae.train.errors import TrainError, one_line

LONGEST = 16 * 1024 * 1024
"""Characters of a document: a longer one is a file whose documents nobody told apart."""
_CHUNK = 1024 * 1024


def plain(path: Path, start: int, *, separator: str) -> Iterator[str]:
    """The documents of a plain file, from number ``start`` on.

    Raises:
        TrainError: not UTF-8, a document that is too long.
    """
    with _reading(path, "rt") as file:
        yield from islice(_split(path, file, separator), start, None)


def jsonl(path: Path, start: int, *, column: str) -> Iterator[str]:
    """The texts in a JSONL file, from line ``start`` on; "" for a blank line.

    Raises:
        TrainError: not JSON, no such column, no text in it.
    """
    with _reading(path, "rb") as file:
        for number, line in islice(enumerate(file, 1), start, None):
            if line.isspace():
                yield ""
                continue
            where = f"{path} line {number}"
            try:
                record = msgspec.json.decode(line)
            except msgspec.DecodeError as err:
                raise TrainError(f"data.path: {where} is not JSON: {one_line(err)}") from err
            yield text_of(record, column, where)


def text_of(record: Any, column: str, where: str) -> str:
    """The text in a record, "" where it is null.

    Raises:
        TrainError: no such column, or something else than text in it.
    """
    if not isinstance(record, Mapping):
        raise TrainError(
            f"data.path: {where} is a JSON {type(record).__name__}, not an object with a column {column!r}"
        )
    if column not in record:
        raise TrainError(f"data.column: {where} has no column {column!r}; it has {', '.join(map(str, record))}")
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TrainError(f"data.column: {column!r} of {where} holds {type(text).__name__}, not text")
    return text


def _split(path: Path, file: IO[Any], separator: str) -> Iterator[str]:
    rest = ""
    while chunk := file.read(_CHUNK):
        *whole, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
        yield from whole
        if len(rest) > LONGEST:
            without = f"without {separator!r}" if separator else "as a single document"
            raise TrainError(
                f"data.separator: {path} has more than {LONGEST} characters {without}; say what parts its documents"
            )
    yield rest


@contextmanager
def _reading(path: Path, mode: str) -> Iterator[IO[Any]]:
    opened: Any = gzip.open if path.name.endswith(".gz") else open
    encoding = "utf-8-sig" if mode == "rt" else None
    try:
        with opened(path, mode, encoding=encoding) as file:
            yield file
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as err:
        raise TrainError(f"data.path: {path} cannot be read: {one_line(err)}") from err
