"""Sums over tokens, chunk by chunk, so that the features of all tokens are never held at once."""

from __future__ import annotations

from math import inf
from typing import TypeAlias

import torch
from torch import Tensor

from saeguard_sae.check.variant import Variant
from saeguard_sae.pursuit import MatchingPursuit
from saeguard_sae.temporal import Temporal

Reader: TypeAlias = Variant | MatchingPursuit | Temporal
"""What is measured: ``encode(x)``, and ``decode(features, x)``, a skip connection included."""

VALUES = 2**24
"""Feature values held at once: 64 MiB in float32, of which an activation needs a few."""


class Tally:
    """What fired on ordinary tokens, and how far the reconstructions are off."""

    def __init__(self) -> None:
        self.tokens = 0
        self._active = 0
        self._fired: Tensor | None = None
        self._error = 0.0
        self._spread = _Spread()

    @property
    def l0(self) -> float:
        """Features that are not 0 on a token, mean."""
        return self._active / self.tokens

    @property
    def dead_share(self) -> float:
        """Share of features that were 0 on every token."""
        assert self._fired is not None, "something was counted"
        return float((~self._fired).float().mean())

    @property
    def fvu(self) -> float:
        """Squared errors by squared deviations from the mean: sums over all tokens, not a mean of ratios."""
        if self._spread.squares:
            return self._error / self._spread.squares
        return inf if self._error else 0.0

    def count(self, features: Tensor) -> None:
        """features [n, d_sae] of n more tokens."""
        is_on = features != 0
        self.tokens += len(features)
        self._active += int(is_on.sum())
        fired = is_on.any(dim=0)
        self._fired = fired if self._fired is None else self._fired | fired

    def compare(self, reconstruction: Tensor, target: Tensor) -> None:
        """Both [n, width] in float32."""
        self._error += float((reconstruction - target).square().sum())
        self._spread.add(target)


class _Spread:
    """Squared deviations from the mean of tokens that come in chunks (Chan, Golub and LeVeque 1979).

    The shorter way over the sum of squares cancels where the mean is long, as in a residual stream.
    """

    def __init__(self) -> None:
        self.squares = 0.0
        self._tokens = 0
        self._mean: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        mean = x.mean(dim=0)
        self.squares += float((x - mean).square().sum())
        ahead = mean.cpu().double() - self._mean
        total = self._tokens + len(x)
        self.squares += float(ahead.square().sum()) * self._tokens * len(x) / total
        self._mean = self._mean + ahead * (len(x) / total)
        self._tokens = total


def read(reader: Reader, x: Tensor, ordinary: Tensor, tally: Tally, *, decodes: bool = True) -> Tensor | None:
    """x [T, d_in], one whole text -> the reconstruction of its ordinary tokens [n, d_out] in float32.

    Args:
        ordinary: bool [T].
        tally: counts the features of those tokens.
        decodes: False leaves the reconstruction out: None.
    """
    if isinstance(reader, Temporal):  # needs the tokens before each token, special ones too
        tally.count(reader.encode(x)[ordinary])
        return reader.reconstruct(x)[ordinary].float() if decodes else None
    parts = []
    for part in torch.split(x[ordinary], max(1, VALUES // reader.d_sae)):
        features = reader.encode(part)
        tally.count(features)
        if decodes:
            parts.append(reader.decode(features, part).float())
    return torch.cat(parts) if decodes else None
