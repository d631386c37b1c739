"""Where text comes from: plain, JSONL and parquet files, and Hugging Face data sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from saeguard_sae.train.errors import TrainError, one_line
from saeguard_sae.train.records import jsonl, plain, text_of
from saeguard_sae.train.stream_settings import DataSettings

INDEX = "activations.json"
"""What a folder of activations has."""
SUFFIXES = {"text": (".txt", ".txt.gz"), "jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}

Records: TypeAlias = Callable[[Path, int], Iterator[str]]
"""``records(path, start)``: the texts of a file from this one on; "" where there is none."""


class Source(Protocol):
    """A data set that can be read from any place on."""

    def begin(self, state: Mapping[str, Any] | None) -> Iterator[str]:
        """Its texts, from the start or from where it was; "" for a record without one."""
        ...

    def state(self) -> dict[str, Any]:
        """Where it is, behind the text that was given last, as plain values."""
        ...


def open_source(settings: DataSettings) -> Source:
    """The source that the settings name.

    Raises:
        TrainError: nothing there, or more than one kind of thing.
    """
    found = kind(settings)
    if found == "activations":
        raise TrainError(f"data.kind: {settings.path!r} holds activations, and text is needed here")
    if found == "hub":
        return HubSource(settings)
    records: dict[str, Records] = {
        "text": partial(plain, separator=settings.separator),
        "jsonl": partial(jsonl, column=settings.column),
        "parquet": partial(_parquet, column=settings.column),
    }
    return FileSource(_files(Path(settings.path).expanduser(), found), records[found])


def kind(settings: DataSettings) -> str:
    """What the data set is: ``data.kind``, found out where that is "auto".

    Raises:
        TrainError: it cannot be told.
    """
    path = Path(settings.path).expanduser()
    if settings.kind != "auto":
        return settings.kind
    if (path / INDEX).is_file():
        return "activations"
    if path.is_dir():
        return _kind_of_folder(path)
    suffixed = [one for one, suffixes in SUFFIXES.items() if path.name.endswith(suffixes)]
    if path.is_file():
        if not suffixed:
            raise TrainError(f"data.kind: cannot be told from the name {path.name!r}; say one of {', '.join(SUFFIXES)}")
        return suffixed[0]
    if suffixed or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", settings.path):
        raise TrainError(f"data.path: there is no file or folder {settings.path!r}")
    return "hub"


class FileSource:
    """Records of files, file after file."""

    def __init__(self, files: tuple[Path, ...], records: Records) -> None:
        self._files = files
        self._records = records
        self._file = self._record = 0
        sizes = "".join(f"{one.name} {one.stat().st_size}\n" for one in files)
        self._digest = sha256(sizes.encode()).hexdigest()

    def begin(self, state: Mapping[str, Any] | None) -> Iterator[str]:
        """See ``Source``.

        Raises:
            TrainError: the files are not those of the state.
        """
        if state is not None and state["digest"] != self._digest:
            raise TrainError("data.path: its files have other names or sizes than when the checkpoint was written")
        self._file, self._record = (state["file"], state["record"]) if state is not None else (0, 0)
        return self._read()

    def state(self) -> dict[str, Any]:
        """See ``Source``."""
        return {"file": self._file, "record": self._record, "digest": self._digest}

    def _read(self) -> Iterator[str]:
        while self._file < len(self._files):
            for text in self._records(self._files[self._file], self._record):
                self._record += 1
                yield text
            self._file, self._record = self._file + 1, 0


class HubSource:
    """A Hugging Face data set, or one in a folder, read as it arrives."""

    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings
        load = _package("datasets", "hub").load_dataset
        try:
            self._data: Any = load(
                settings.path,
                settings.name or None,
                split=settings.split,
                revision=settings.revision or None,
                streaming=True,
            )
        except Exception as err:  # the library, and what it reads with, raise what they like
            raise TrainError(f"data.path: {settings.path!r} cannot be read from the hub: {one_line(err)}") from err
        self._start = self._resumed = self._data.state_dict()
        self._is_moved = False

    def begin(self, state: Mapping[str, Any] | None) -> Iterator[str]:
        """See ``Source``."""
        self._resumed = self._start if state is None else state["data"]
        self._is_moved = False
        # A copy: the library changes what it is given.
        self._data.load_state_dict(deepcopy(self._resumed))
        return self._read()

    def state(self) -> dict[str, Any]:
        """See ``Source``."""
        # What the library says before it has read on is the state that it was made with.
        return {"data": self._data.state_dict() if self._is_moved else deepcopy(self._resumed)}

    def _read(self) -> Iterator[str]:
        try:
            for record in self._data:
                self._is_moved = True
                yield text_of(record, self._settings.column, self._settings.path)
        except TrainError:
            raise
        except Exception as err:  # as above
            raise TrainError(f"data.path: {self._settings.path!r} cannot be read on: {one_line(err)}") from err


def _parquet(path: Path, start: int, *, column: str) -> Iterator[str]:
    package = _package("pyarrow.parquet", "parquet")
    try:
        file = package.ParquetFile(path, memory_map=True)
    except (ValueError, OSError) as err:
        raise TrainError(f"data.path: {path} cannot be read: {one_line(err)}") from err
    with file:
        names = file.schema_arrow.names
        if column not in names:
            raise TrainError(f"data.column: {path} has no column {column!r}; it has {', '.join(names)}")
        held = str(file.schema_arrow.field(column).type)
        if held not in ("string", "large_string", "string_view"):
            raise TrainError(f"data.column: {column!r} of {path} holds {held}, not text")
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start >= rows:
                start -= rows
                continue
            for batch in file.iter_batches(256, row_groups=[group], columns=[column]):
                yield from ("" if text is None else text for text in batch.column(0)[start:].to_pylist())
                start = max(0, start - len(batch))


def _files(path: Path, found: str) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    files = tuple(sorted(one for one in path.rglob("*") if one.name.endswith(SUFFIXES[found]) and one.is_file()))
    if not files:
        what = f"holds no {' or '.join(SUFFIXES[found])} files" if path.is_dir() else "does not exist"
        raise TrainError(f"data.path: {str(path)!r} {what}")
    return files


def _kind_of_folder(path: Path) -> str:
    names = [one.name for one in path.rglob("*") if one.is_file()]
    kinds = [one for one, suffixes in SUFFIXES.items() if any(name.endswith(suffixes) for name in names)]
    if not kinds:
        wanted = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise TrainError(f"data.path: {str(path)!r} holds no files that can be read ({wanted}, or {INDEX})")
    if len(kinds) > 1:
        raise TrainError(f"data.kind: {str(path)!r} holds files of several kinds; say one of {', '.join(kinds)}")
    return kinds[0]


def _package(name: str, needed_for: str) -> Any:
    try:
        return import_module(name)
    except ImportError as err:
        package = name.partition(".")[0]
        raise TrainError(f"data.kind: {needed_for!r} needs the package {package}; install it") from err
