"""What a format's loader returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from saeguard_sae.dictionary import Dictionary
from saeguard_sae.site import Site


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """An SAE read from disk: its weights, where it belongs if the files say so, and the files it came from."""

    dictionary: Dictionary
    site: Site | None
    files: tuple[Path, ...]
