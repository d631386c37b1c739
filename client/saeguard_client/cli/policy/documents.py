"""Policy files on disk, as the server wants them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from saeguard_client.cli.usage import UsageError

_KINDS = (".yaml", ".yml", ".json")


def read(paths: Iterable[Path]) -> dict[str, str]:
    """Content by name, of these files and of those in these folders, their folders included.

    Raises:
        UsageError: a file cannot be read, two have one name, or there is none.
    """
    found: dict[str, str] = {}
    for path in paths:
        for name, file in _files(path):
            if name in found:
                raise UsageError(f"{file}: another file is called {name} too")
            found[name] = _text(file)
    if not any(not name.endswith(".json") for name in found):
        raise UsageError("there is no .yaml file")
    return found


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if not path.is_dir():
        yield path.name, path
        return
    for file in sorted(path.rglob("*")):
        if file.suffix in _KINDS and file.is_file():
            yield file.relative_to(path).as_posix(), file


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as err:
        raise UsageError(f"{file}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise UsageError(f"{file}: not UTF-8 at byte {err.start}") from err
