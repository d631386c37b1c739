"""The trained tensors of every feature, one row each, with what the optimiser keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from saeguard_sae.train.kernels.rough import Rough
from saeguard_sae.train.settings import Precision


@dataclass(frozen=True, slots=True)
class Rates:
    """Adam (Kingma and Ba 2014) of one step; gradients are multiplied by ``scale`` first."""

    rate: float
    scale: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True, slots=True, eq=False)
class FeatureRows:
    """Weights, gradients and moments, feature by feature. Rows without a gradient in a step are left as they are, and
    every row has a clock of its own: Adam as if there were an optimiser for each feature, run when it has a gradient.
    """

    W_enc: Tensor
    """[F, d_in]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, d_out], unit rows"""
    g_enc: Tensor
    g_bias: Tensor
    g_dec: Tensor
    """Gradients; what they hold of a row that is not ``active`` means nothing."""
    m_enc: Tensor
    v_enc: Tensor
    m_bias: Tensor
    v_bias: Tensor
    m_dec: Tensor
    v_dec: Tensor
    active: Tensor
    """uint8 [F] whether the row has a gradient."""
    clock: Tensor
    """int32 [F] updates so far."""
    rough: Rough
    """``W_enc`` again, as what proposes features reads it."""

    @classmethod
    def new(cls, W_enc: Tensor, W_dec: Tensor, precision: Precision = "float32") -> FeatureRows:
        """Untrained: W_enc [F, d_in] and W_dec [F, d_out] are taken, biases are 0."""
        count = len(W_enc)
        bias = W_enc.new_zeros(count)
        return cls(
            W_enc, bias, W_dec,
            torch.zeros_like(W_enc), bias.clone(), torch.zeros_like(W_dec),
            torch.zeros_like(W_enc), torch.zeros_like(W_enc), bias.clone(), bias.clone(),
            torch.zeros_like(W_dec), torch.zeros_like(W_dec),
            torch.zeros(count, dtype=torch.uint8, device=W_enc.device),
            torch.zeros(count, dtype=torch.int32, device=W_enc.device),
            Rough.of(W_enc, precision),
        )  # fmt: skip

    def restart(self, chosen: Tensor, scale: float) -> None:
        """These features (bool [F]) begin anew: ``scale`` times the decoder row to encode with, no bias, no moments."""
        at = chosen.nonzero().flatten()
        self.W_enc[at] = scale * self.W_dec[at]
        for tensor in (
            self.b_enc,
            self.m_enc,
            self.v_enc,
            self.m_bias,
            self.v_bias,
            self.m_dec,
            self.v_dec,
            self.clock,
        ):
            tensor.index_fill_(0, at, 0)
        self.rough.write(at, self.W_enc[at])

    def state(self) -> dict[str, Tensor]:
        """What must be kept to go on; gradients and the rough copy need not."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _MADE_AGAIN}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from there."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.active.zero_()
        self.rough.write(slice(None), self.W_enc)


_MADE_AGAIN = ("g_enc", "g_bias", "g_dec", "active", "rough")
