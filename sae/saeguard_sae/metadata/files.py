"""Reads published files record by record, compressed or not, so that large ones never lie in memory as a whole."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import msgspec

from saeguard_sae.catalogue import BadCatalogue

Stream: TypeAlias = io.BufferedReader | gzip.GzipFile

LONGEST_LINE = 16 * 2**20
LARGEST_ARRAY = 512 * 2**20
"""An array is one JSON value, which is read as a whole; the same records one a line need no such limit."""
_BOM = b"\xef\xbb\xbf"


def json_records(file: Path) -> Iterator[tuple[str, bytes]]:
    """Every record of a file of JSON, one a line or all in an array, with where it stands.

    Raises:
        BadCatalogue: damaged, too large, or an array that is not JSON.
    """
    with _opened(file) as stream:
        start = stream.peek(1024).removeprefix(_BOM).lstrip()
        yield from _elements(file, stream) if start.startswith(b"[") else _lines(file, stream)


def text_lines(file: Path) -> Iterator[str]:
    """Every line of a text file with its line end, decoded from UTF-8.

    Raises:
        BadCatalogue: damaged, not text, or a line is too long.
    """
    with _opened(file) as stream:
        for number, line in _numbered(file, stream):
            try:
                yield line.decode()
            except UnicodeDecodeError as err:
                raise BadCatalogue(f"{file}:{number}: not UTF-8: {err}") from err


def _lines(file: Path, stream: Stream) -> Iterator[tuple[str, bytes]]:
    for number, line in _numbered(file, stream):
        if line.strip():
            yield f"{file}:{number}", line


def _elements(file: Path, stream: Stream) -> Iterator[tuple[str, bytes]]:
    data = stream.read(LARGEST_ARRAY + 1)
    if len(data) > LARGEST_ARRAY:
        raise BadCatalogue(f"{file}: an array of more than {LARGEST_ARRAY} bytes; write one record a line")
    try:
        found = msgspec.json.decode(data.removeprefix(_BOM), type=list[msgspec.Raw])
    except msgspec.DecodeError as err:
        raise BadCatalogue(f"{file}: not JSON: {err}") from err
    for number, one in enumerate(found):
        yield f"{file}[{number}]", bytes(one)


def _numbered(file: Path, stream: Stream) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise BadCatalogue(f"{file}:{number}: a line of more than {LONGEST_LINE} bytes")
        yield number, line.removeprefix(_BOM) if number == 1 else line


@contextmanager
def _opened(file: Path) -> Iterator[Stream]:
    """The file's bytes, unpacked where it begins as gzip does, whatever its name."""
    try:
        with file.open("rb") as raw:
            if raw.peek(2)[:2] != b"\x1f\x8b":
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked
    except (OSError, EOFError, zlib.error) as err:
        raise BadCatalogue(f"{file}: {err}") from err
