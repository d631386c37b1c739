"""Reads a directory's YAML files at one moment, or says that it could not."""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from saeguard_server.guard.policy.store.protocol import ContentRefused, StoreUnreachable

SUMS = "SHA256SUMS"
"""As ``sha256sum *.yaml *.json > SHA256SUMS`` writes it; where it is, every file must be in it and match."""
SWAPPED = "..data"
"""The symbolic link by which Kubernetes replaces all files of a mounted ConfigMap at once."""
SETTLED_S = 0.2
"""Files must be the same after so long: somebody may be writing."""
MAX_BYTES = 16 * 2**20
"""Of all files together."""
SUFFIXES = (".yaml", ".yml", ".json")
_SUM = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?([^/]+)")


@dataclass(frozen=True, slots=True)
class Files:
    """Names and contents, in the order of the names."""

    contents: dict[str, bytes]

    def named(self, *suffixes: str) -> list[str]:
        """Names of the files that end so."""
        return [name for name in self.contents if name.endswith(suffixes)]

    @property
    def digest(self) -> str:
        """SHA-256, hex, over names and contents."""
        total = hashlib.sha256()
        for name, content in self.contents.items():
            total.update(f"{name}\0{len(content)}\0".encode())
            total.update(content)
        return total.hexdigest()


async def read(path: Path, known: str = "") -> Files:
    """All files, once they have settled; at once if their digest is ``known``. Hidden ones and folders are left out.

    Raises:
        StoreUnreachable: the directory, or a file in it, cannot be read.
        ContentRefused: they keep changing, are too large, or SHA256SUMS does not match.
    """
    files = await asyncio.to_thread(_look, path)
    if files.digest == known:
        return files
    await asyncio.sleep(SETTLED_S)
    if await asyncio.to_thread(_look, path) != files:
        raise ContentRefused("files are being changed")
    _check_sums(files.contents)
    return files


def _look(path: Path) -> Files:
    try:
        # Resolved once: every file is then read on the same side of a swap.
        folder = (path / SWAPPED if (path / SWAPPED).is_symlink() else path).resolve(strict=True)
        names = sorted(one.name for one in folder.iterdir() if _is_wanted(one))
        files = Files({name: (folder / name).read_bytes() for name in names})
    except OSError as err:
        raise StoreUnreachable(f"{err.filename or path}: {err.strerror}") from err
    if sum(map(len, files.contents.values())) > MAX_BYTES:
        raise ContentRefused(f"files are larger than {MAX_BYTES} bytes together")
    return files


def _is_wanted(path: Path) -> bool:
    is_named = path.name == SUMS or path.suffix in SUFFIXES
    return is_named and not path.name.startswith(".") and not path.is_dir()


def _check_sums(contents: dict[str, bytes]) -> None:
    if SUMS not in contents:
        return
    expected = dict(_sum(line) for line in contents[SUMS].decode(errors="replace").splitlines())
    found = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items() if name != SUMS}
    wrong = sorted(name for name, _ in expected.items() ^ found.items())
    if wrong:
        raise ContentRefused(f"{SUMS} does not match, or does not list, {', '.join(dict.fromkeys(wrong))}")


def _sum(line: str) -> tuple[str, str]:
    found = _SUM.fullmatch(line)
    if found is None:
        raise ContentRefused(f"{SUMS}: not a line of sha256sum: {line[:80]!r}")
    return found[2], found[1]
