"""Activations that let a feature through only if it beats its rivals: TopK, AbsTopK, GroupMax.

A feature's value needs its rank, not its rivals' values. So one feature is computed from its own pre-activation and a
count of how many rivals score higher, which can stop early (``ranking``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeGuard

import torch
from torch import Tensor

from saeguard_sae.activations import Activation, Columns


class Selection(Activation, Protocol):
    """An activation under which a feature is ``value(p)`` if fewer than ``limit`` rivals score above it, else 0."""

    @property
    def limit(self) -> int: ...

    @property
    def groups(self) -> int:
        """Into how many contiguous blocks of features the rivals are split."""
        ...

    def score(self, pre: Tensor) -> Tensor:
        """What is compared."""
        ...

    def value(self, pre: Tensor) -> Tensor:
        """What a feature is worth when it is let through, before its ``gain``."""
        ...


def is_selection(activation: Activation) -> TypeGuard[Selection]:
    """Whether its features compete."""
    return isinstance(activation, TopK | AbsTopK | GroupMax)


class _Competing:
    """What the three share: no columns of their own, an optional gain per feature."""

    gain: Tensor | None
    local: ClassVar[bool] = False

    def columns(self, b_enc: Tensor) -> Columns:
        """The pre-activation alone: never let through until its rank is known."""
        ones = torch.ones_like(b_enc)
        return Columns(ones, b_enc, b_enc, torch.full_like(b_enc, torch.inf))

    def parameters(self) -> dict[str, Tensor]:
        return {} if self.gain is None else {"gain": self.gain}

    def _scaled(self, features: Tensor) -> Tensor:
        return features if self.gain is None else features * self.gain


@dataclass(frozen=True, slots=True)
class TopK(_Competing):
    """The k largest pre-activations of each token, negative ones as 0 (Gao et al. 2024).

    Args:
        keeps_negative: negative ones stay as they are, as in circuit-tracer.
        gain: [d_sae] multiplies what was let through, where features are ranked in other units than their own.
    """

    k: int
    keeps_negative: bool = False
    gain: Tensor | None = field(default=None, kw_only=True)
    name: ClassVar[str] = "topk"
    groups: ClassVar[int] = 1

    @property
    def limit(self) -> int:
        return self.k

    def score(self, pre: Tensor) -> Tensor:
        return pre

    def value(self, pre: Tensor) -> Tensor:
        return pre if self.keeps_negative else pre.relu()

    def __call__(self, pre: Tensor) -> Tensor:
        values, index = pre.topk(self.k, dim=-1)
        return self._scaled(torch.zeros_like(pre).scatter_(-1, index, self.value(values)))

    def with_parameters(self, tensors: dict[str, Tensor]) -> Activation:
        return TopK(self.k, self.keeps_negative, gain=tensors.get("gain"))


@dataclass(frozen=True, slots=True)
class AbsTopK(_Competing):
    """The k pre-activations of largest magnitude of each token, with their sign."""

    k: int
    gain: Tensor | None = field(default=None, kw_only=True)
    name: ClassVar[str] = "abstopk"
    groups: ClassVar[int] = 1

    @property
    def limit(self) -> int:
        return self.k

    def score(self, pre: Tensor) -> Tensor:
        return pre.abs()

    def value(self, pre: Tensor) -> Tensor:
        return pre

    def __call__(self, pre: Tensor) -> Tensor:
        index = pre.abs().topk(self.k, dim=-1).indices
        return self._scaled(torch.zeros_like(pre).scatter_(-1, index, pre.gather(-1, index)))

    def with_parameters(self, tensors: dict[str, Tensor]) -> Activation:
        return AbsTopK(self.k, gain=tensors.get("gain"))


@dataclass(frozen=True, slots=True)
class GroupMax(_Competing):
    """The largest of each of k contiguous blocks of d_sae / k features, negative ones as 0 (EleutherAI sparsify)."""

    k: int
    gain: Tensor | None = field(default=None, kw_only=True)
    name: ClassVar[str] = "groupmax"
    limit: ClassVar[int] = 1

    @property
    def groups(self) -> int:
        return self.k

    def score(self, pre: Tensor) -> Tensor:
        return pre

    def value(self, pre: Tensor) -> Tensor:
        return pre.relu()

    def __call__(self, pre: Tensor) -> Tensor:
        blocks = pre.view(*pre.shape[:-1], self.k, -1)
        values, index = blocks.relu().max(dim=-1, keepdim=True)
        return self._scaled(torch.zeros_like(blocks).scatter_(-1, index, values).flatten(-2))

    def with_parameters(self, tensors: dict[str, Tensor]) -> Activation:
        return GroupMax(self.k, gain=tensors.get("gain"))
