"""On-disk formats, one module each: ``NAME``, ``recognises(path)`` and ``load(path) -> Found``.

Foreign hook names live in these modules and nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from saeguard_sae.formats import saelens
from saeguard_sae.formats.found import Found


class Format(Protocol):
    """What a format's module offers."""

    NAME: str

    def recognises(self, path: Path) -> bool:
        """Whether the folder holds this format."""
        ...

    def load(self, path: Path) -> Found:
        """The SAE in the folder.

        Raises:
            ValueError: something in it is not understood or not supported, named.
        """
        ...


FORMATS: tuple[Format, ...] = (saelens,)  # in order of detection

__all__ = ["FORMATS", "Format", "Found"]
