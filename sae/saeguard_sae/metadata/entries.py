"""What one record of a published file says about one feature, before units are converted and records merged."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite

from saeguard_sae.catalogue import BadCatalogue, Example, PromotedToken

_DIGITS = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Label:
    """A label, and how well it predicts the feature by some metric, where somebody scored it."""

    text: str
    score: float | None = None
    metric: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One record, in the file's own units; what it does not say is empty. ``where``: file and line, for errors."""

    where: str
    index: int
    model: str | None = None
    source: str | None = None
    """The SAE that it is about, as the publisher calls it; None where the file cannot say."""
    labels: tuple[Label, ...] = ()
    maximum: float | None = None
    density: float | None = None
    top_tokens: tuple[PromotedToken, ...] = ()
    examples: tuple[Example, ...] = ()


def index_of(value: int | str, where: str) -> int:
    """A feature's number, which some files write as text.

    Raises:
        BadCatalogue: it is neither.
    """
    if isinstance(value, str) and not _DIGITS.fullmatch(value):
        raise BadCatalogue(f"{where}: index: must be a whole number, got {value[:40]!r}")
    return int(value)


def finite(value: float, name: str, where: str) -> float:
    """The number.

    Raises:
        BadCatalogue: it is infinite or not a number.
    """
    if not isfinite(value):
        raise BadCatalogue(f"{where}: {name}: must be a finite number, got {value}")
    return value


def share(value: float, name: str, where: str) -> float:
    """The number, which is a share of something.

    Raises:
        BadCatalogue: it is outside 0..1.
    """
    if not 0.0 <= value <= 1.0:
        raise BadCatalogue(f"{where}: {name}: must be 0 to 1, got {value}")
    return value
