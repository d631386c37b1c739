"""What one guard is: the sum it looks at, how it decides, on which tokens; and what it has seen."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from saeguard_sae.coder import SparseCoder

Comparison: TypeAlias = Literal["above", "at_least", "below", "at_most"]
WindowKind: TypeAlias = Literal["this_token", "any_so_far", "maximum", "rolling_mean", "k_of_n"]

NEVER: int = torch.iinfo(torch.int64).max
"""The first position of a guard that has not been on."""


@dataclass(frozen=True, slots=True, eq=False)
class Summand:
    """Weighted features of one coder, read at one place of the model."""

    place: Hashable
    """Where it is read, and the guard decided if it is the last: what ``Guards.see`` is told."""
    source: Hashable
    """Which tensor it reads there; None for the one that is edited at the place."""
    coder: SparseCoder
    features: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guard:
    """``bias + sum`` over a window, compared with a threshold, on tokens at positions ``[first, last)``.

    On from the token on which it compares true until one on which it no longer does with ``release``. Tokens out of
    scope leave it as it is. ``window``: the present value, its running maximum, the mean of the last ``tokens`` values
    (of fewer while there are fewer), or whether ``k`` of them compared true; ``any_so_far`` stays on.
    """

    summands: tuple[Summand, ...]
    """In the order in which a forward pass reaches their places."""
    bias: float = 0.0
    comparison: Comparison = "above"
    threshold: float = 0.0
    release: float = 0.0
    window: WindowKind = "this_token"
    tokens: int = 1
    k: int = 1
    first: int = 0
    last: int = NEVER
    special: bool = False
    """Also on special tokens."""
    latches: bool = False
    """For edits it stays on once it was on."""
    stops: bool = False
    """``Guards.stopped`` tells when it was on."""

    @property
    def looks_back(self) -> int:
        """Earlier values that it needs."""
        return self.tokens - 1 if self.is_windowed else 0

    @property
    def is_windowed(self) -> bool:
        """Whether it looks at more than one value."""
        return self.window in ("rolling_mean", "k_of_n")


@dataclass(frozen=True, slots=True)
class Seen:
    """What one guard saw so far, on the tokens in its scope."""

    evaluated: int
    on: int
    first: int | None
    """Position of the first token on which it was on."""
    maximum: float
    """Largest value of its sum; -inf where nothing was evaluated."""
