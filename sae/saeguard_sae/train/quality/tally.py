"""Sums over tokens, part by part, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saeguard_sae.check.tally import VALUES, Reader
from saeguard_sae.check.tally import Tally as Errors

Watch = Callable[[Tensor, int], None]
"""``watch(features [n, d_sae], start)``: of the tokens from ``start`` on."""


class Tally:
    """What fired on a token, what fired at all, and how near the reconstructions come."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.tokens = 0
        self.by_l0 = torch.zeros(d_sae + 1, dtype=torch.long, device=device)
        """[d_sae + 1] tokens on which so many features fired."""
        self.fired = torch.zeros(d_sae, dtype=torch.long, device=device)
        """[d_sae] tokens on which each feature fired."""
        self._errors = Errors()
        self._cosine = torch.zeros((), dtype=torch.float64, device=device)
        self._ratio = torch.zeros((), dtype=torch.float64, device=device)
        self._directed = torch.zeros((), dtype=torch.long, device=device)

    def count(self, features: Tensor) -> None:
        """features [n, d_sae] of n more tokens; a feature fires where it is not 0."""
        is_on = features != 0
        self.tokens += len(features)
        self.by_l0 += torch.bincount(is_on.sum(1), minlength=len(self.by_l0))
        self.fired += is_on.sum(0)

    def compare(self, made: Tensor, wanted: Tensor) -> None:
        """Reconstructions and what they stand for, both [n, width] in float32."""
        self._errors.compare(made, wanted)
        made_norm, norm = made.norm(dim=1).double(), wanted.norm(dim=1).double()
        dot = (made.double() * wanted).sum(1)
        is_directed = norm > 0  # a token of zeros has neither a direction nor a ratio
        self._directed += is_directed.sum()
        self._cosine += (dot / (made_norm * norm).clamp(min=1e-30))[is_directed].sum()
        self._ratio += (made_norm / norm.clamp(min=1e-30))[is_directed].sum()

    @property
    def l0(self) -> float:
        """Features that fire on a token, mean."""
        return float(self.fired.sum()) / self.tokens

    @property
    def fvu(self) -> float:
        """Squared errors by squared deviations from the mean: sums over all tokens, not a mean of ratios."""
        return self._errors.fvu

    @property
    def cosine(self) -> float:
        """Between a token's reconstruction and what it stands for, mean; 0 for a reconstruction of zeros."""
        return float(self._cosine / self._directed.clamp(min=1))

    @property
    def norm_ratio(self) -> float:
        """Length of a token's reconstruction by the length of what it stands for, mean; below 1 is shrinkage."""
        return float(self._ratio / self._directed.clamp(min=1))

    @property
    def dead_share(self) -> float:
        """Share of features that never fired."""
        return float((self.fired == 0).double().mean())

    @property
    def density(self) -> Tensor:
        """[d_sae] share of tokens on which each feature fired, float64."""
        return self.fired.double().cpu() / self.tokens


def read(reader: Reader, x: Tensor, wanted: Tensor, tally: Tally, watch: Watch | None = None) -> Tensor:
    """x [n, d_in] -> reconstructions [n, d_out] in float32, counted and compared with ``wanted`` [n, d_out]."""
    made = torch.empty_like(wanted)
    size = max(1, VALUES // reader.d_sae)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        features = reader.encode(x[part])
        made[part] = reader.decode(features, x[part]).float()
        tally.count(features)
        if watch is not None:
            watch(features, start)
    tally.compare(made, wanted)
    return made
