"""What every kind of edit is to an edit table: one affine map with bounds of a feature's value."""

from __future__ import annotations

from math import inf
from typing import Final, NamedTuple

FLOAT32_MAX: Final = 3.4028234663852886e38


class Affine(NamedTuple):
    """``f' = min(max(alpha * f + beta, lo), hi)``. The default changes nothing, exactly."""

    alpha: float = 1.0
    beta: float = 0.0
    lo: float = -inf
    hi: float = inf

    def of(self, f: float) -> float:
        return min(max(self.alpha * f + self.beta, self.lo), self.hi)


IDENTITY: Final = Affine()
