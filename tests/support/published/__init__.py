"""Small SAEs as other libraries publish them: one module per format with ``BUILDERS``, without our code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeAlias

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Published:
    """One SAE on disk, and what it computes by its library's formulas, written out in float64."""

    path: Path
    """What is given to the loader: a folder or a file."""
    weights: Path
    """The (or one) file of weights."""
    config: Path | None
    """The file of settings, where the format has one."""
    d_in: int
    encode: Callable[[Tensor], Tensor]
    """x [tokens, d_in] in float64 -> features [tokens, d_sae], in the units that the library gives."""
    reconstruct: Callable[[Tensor], Tensor] | None = None
    """x -> reconstruction [tokens, d_out], with skip connection; None where the library's own is something else."""
    choices: dict[str, Any] = field(default_factory=dict)
    """What the user has to say (``Choices``)."""
    optional: frozenset[str] = frozenset()
    """Weights without which the same files are another valid SAE."""
    free_keys: bool = False
    """Whether the settings hold what only training read, so that unknown keys say nothing about the weights."""
    repo: str | None = None
    """The hub repository and path that it came from, where that decides something."""
    repo_path: str = ""


Builder: TypeAlias = Callable[[Path, int], Published]
"""Writes a random SAE into an empty folder from a seed."""


def builders() -> dict[str, Builder]:
    """Every builder of every format, by a name that begins with the format's module."""
    found: dict[str, Builder] = {}
    for module in iter_modules(__path__):
        found |= import_module(f"{__name__}.{module.name}").BUILDERS
    return found
