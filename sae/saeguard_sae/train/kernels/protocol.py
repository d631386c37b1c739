"""What both kinds of kernels do."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from saeguard_sae.train.kernels.pairs import Decoded, Pairs
from saeguard_sae.train.kernels.rough import Rough
from saeguard_sae.train.kernels.rows import FeatureRows, Rates


class Kernels(Protocol):
    """B tokens, F features, n pairs, L levels. Nothing here is part of an autograd graph."""

    name: str

    def above(self, x: Tensor, W: Rough, bias: Tensor, cut: float) -> Pairs:
        """x [B, d], W [F, d], bias [F] -> pairs whose pre-activation is above ``cut``, which must not be negative."""
        ...

    def largest(self, x: Tensor, W: Rough, bias: Tensor, k: int) -> tuple[Pairs, Tensor]:
        """x [B, d], W [F, d], bias [F] -> each token's k largest pre-activations of those that are positive, of equal
        ones those that come first; and these [n], as roughly as W is."""
        ...

    def strongest(self, pairs: Pairs, values: Tensor, k: int) -> Tensor:
        """values [n], none below 0 -> bool [n] whether a pair is among its token's k largest; of equal ones those that
        come first."""
        ...

    def read(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, pairs: Pairs) -> Tensor:
        """x [B, d_in] -> [n] ``relu(x . w + b)`` of each pair."""
        ...

    def decode(
        self, target: Tensor, W_dec: Tensor, pairs: Pairs, values: Tensor, ends: Tensor, weights: Tensor
    ) -> Decoded:
        """target [B, d_out], values [n]; ``ends`` int32 [L] the levels' widths, ``weights`` [L] of their errors."""
        ...

    def gradients(
        self, x: Tensor, decoded: Decoded, pairs: Pairs, values: Tensor, ends: Tensor, rows: FeatureRows
    ) -> None:
        """Adds the pairs' gradients to the features' rows, and makes these active."""
        ...

    def lengths(self, rows: FeatureRows) -> Tensor:
        """[F] squared length of each active row's gradient without the decoder's part along its own row; else 0."""
        ...

    def adam(self, rows: FeatureRows, rates: Rates) -> None:
        """Updates the active rows, decoder rows staying on the unit sphere; no row is active afterwards."""
        ...
