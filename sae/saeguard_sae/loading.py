"""From a path to an SAE that can be served: finds the format, checks the weights, reads the catalogue."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from saeguard_sae import catalogue
from saeguard_sae.catalogue import Catalogue
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats import FORMATS, Found
from saeguard_sae.site import Site


class LoadError(ValueError):
    """An SAE that cannot be loaded; the message names the file and what would help."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedSae:
    """An SAE with its place in the model. ``digest`` is the SHA-256 of its weight and config files, hex."""

    name: str
    site: Site
    dictionary: Dictionary
    digest: str
    catalogue: Catalogue


def load(name: str, path: Path, site: Site | None = None) -> LoadedSae:
    """The SAE in ``path``, in float32.

    Args:
        name: what callers will call it.
        path: a folder in one of the known formats.
        site: overrides what the files say.

    Raises:
        LoadError: unknown format, a convention not supported, bad weights, or no site known.
    """
    try:
        found = _read(path)
        where = site if site is not None else found.site
        if where is None:
            raise ValueError("its files do not say where in the model it belongs; give the site")
        entries = catalogue.read(path, found.dictionary.d_sae)
    except (ValueError, OSError) as err:
        raise LoadError(f"SAE {name!r} in {path}: {err}") from err
    return LoadedSae(name, where, found.dictionary.to("cpu"), digest(found.files), entries)


def digest(files: tuple[Path, ...]) -> str:
    """SHA-256 over the files' names and bytes in the order of their names, hex."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda one: one.name):
        with file.open("rb") as stream:
            part = hashlib.file_digest(stream, "sha256").digest()
        total.update(file.name.encode() + b"\0" + part)
    return total.hexdigest()


def _read(path: Path) -> Found:
    if not path.is_dir():
        raise FileNotFoundError("no such folder")
    for known in FORMATS:
        if known.recognises(path):
            return known.load(path)
    raise ValueError(f"not a known SAE format; known are {', '.join(one.NAME for one in FORMATS)}")
