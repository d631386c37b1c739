"""Whether files have changed since they were read, for what is renewed under a running server."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = tuple[tuple[int, int, int], ...]


def stamp(files: Iterable[Path]) -> Stamp:
    """Differs once a file was replaced or written; links are followed, as a mounted Kubernetes Secret is all links.

    Raises:
        OSError: a file is not there or may not be looked at.
    """
    # The size too: a file that is emptied and then written can be both within one tick of the file system's clock.
    return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in (file.stat() for file in files))
