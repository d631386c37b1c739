"""What turns one feature's pre-activation into its value, and what is common to every such function.

Those that compare a feature with its rivals (TopK and its kin) are in ``selections``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Activation(Protocol):
    """Pre-activations ``p = x @ W_enc + b_enc`` to feature values."""

    name: ClassVar[str]
    local: ClassVar[bool]
    """True when a feature's value depends on its own pre-activation alone, so that it can be computed alone."""

    def __call__(self, pre: Tensor) -> Tensor:
        """pre [..., d_sae] -> features [..., d_sae]."""
        ...

    def columns(self, b_enc: Tensor) -> Columns:
        """The scalars by which one feature is computed from ``q = x . w_j``; only when ``local``."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Tensors of length d_sae by the name they have on disk."""
        ...

    def with_parameters(self, tensors: dict[str, Tensor]) -> Activation:
        """The same activation with these in place of its ``parameters``."""
        ...


@dataclass(frozen=True, slots=True)
class Columns:
    """Per feature [d_sae]: ``f = relu(gain * q + bias) if q + gate > threshold else 0``, with ``q = x . w_j``.

    ``squashed``: ``tanh`` of that.
    """

    gain: Tensor
    bias: Tensor
    gate: Tensor
    threshold: Tensor
    squashed: bool = False


@dataclass(frozen=True, slots=True)
class ReLU:
    """``max(p, 0)``: the classic SAE."""

    name: ClassVar[str] = "relu"
    local: ClassVar[bool] = True

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu()

    def columns(self, b_enc: Tensor) -> Columns:
        never = torch.full_like(b_enc, -torch.inf)
        return Columns(torch.ones_like(b_enc), b_enc, b_enc, never)

    def parameters(self) -> dict[str, Tensor]:
        return {}

    def with_parameters(self, tensors: dict[str, Tensor]) -> Activation:
        return self


@dataclass(frozen=True, slots=True)
class TanhReLU:
    """``tanh(max(p, 0))``: what SAELens before 6.0 calls ``tanh-relu``; its later versions load it as ReLU."""

    name: ClassVar[str] = "tanh_relu"
    local: ClassVar[bool] = True

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu().tanh()

    def columns(self, b_enc: Tensor) -> Columns:
        never = torch.full_like(b_enc, -torch.inf)
        return Columns(torch.ones_like(b_enc), b_enc, b_enc, never, squashed=True)

    def parameters(self) -> dict[str, Tensor]:
        return {}

    def with_parameters(self, tensors: dict[str, Tensor]) -> Activation:
        return self


@dataclass(frozen=True, slots=True)
class JumpReLU:
    """``max(p, 0) where p > threshold`` (Rajamanoharan et al. 2024); also BatchTopK with its stored threshold."""

    threshold: Tensor
    name: ClassVar[str] = "jumprelu"
    local: ClassVar[bool] = True

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu() * (pre > self.threshold)

    def columns(self, b_enc: Tensor) -> Columns:
        return Columns(torch.ones_like(b_enc), b_enc, b_enc, self.threshold)

    def parameters(self) -> dict[str, Tensor]:
        return {"threshold": self.threshold}

    def with_parameters(self, tensors: dict[str, Tensor]) -> Activation:
        return JumpReLU(**tensors)


@dataclass(frozen=True, slots=True)
class Gated:
    """``relu(q * exp(r_mag) + b_mag) where q + b_gate > 0`` (Rajamanoharan et al. 2024); there is no ``b_enc``."""

    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    name: ClassVar[str] = "gated"
    local: ClassVar[bool] = True

    def __call__(self, pre: Tensor) -> Tensor:
        return (pre * self.r_mag.exp() + self.b_mag).relu() * (pre + self.b_gate > 0)

    def columns(self, b_enc: Tensor) -> Columns:
        """``b_enc`` holds only what centring moved into it: see ``Dictionary.centred_bias``."""
        gain = self.r_mag.exp()
        return Columns(gain, self.b_mag + gain * b_enc, self.b_gate + b_enc, torch.zeros_like(b_enc))

    def parameters(self) -> dict[str, Tensor]:
        return {"b_gate": self.b_gate, "b_mag": self.b_mag, "r_mag": self.r_mag}

    def with_parameters(self, tensors: dict[str, Tensor]) -> Activation:
        return Gated(**tensors)
