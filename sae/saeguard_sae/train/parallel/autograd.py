"""A layer whose features lie in several processes, for autograd; as Megatron-LM does it (Shoeybi et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from saeguard_sae.train.parallel.mesh import Mesh


def spread(x: Tensor, mesh: Mesh) -> Tensor:
    """x as every part of the features reads it; its gradient is the sum of what they say."""
    return x if mesh.shards == 1 else _Spread.apply(x, mesh)  # type: ignore[no-untyped-call]


def joined(part: Tensor, mesh: Mesh) -> Tensor:
    """The sum of what every part of the features writes; its gradient is each part's."""
    return part if mesh.shards == 1 else _Joined.apply(part, mesh)  # type: ignore[no-untyped-call]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mesh: Mesh) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx, given: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return ctx.mesh.sum_features(given.clone()), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, mesh: Mesh) -> Tensor:  # type: ignore[no-untyped-def]
        return mesh.sum_features(part.clone())

    @staticmethod
    def backward(ctx, given: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return given, None
