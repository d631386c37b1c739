"""Writes the activations that a benchmark trains on. Run as a process of its own: it needs more memory than they do."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.train.plan import HELD_OUT, TRAIN
from support.truth import Truth, toy

OVERCOMPLETE = 4
FIRED = 24.0
NOISE = 0.3


def write(path: Path, train: Tensor, held_out: Tensor) -> None:
    """Both [tokens, d_in], scaled by one number to a mean squared norm of d_in, at which no library has to scale."""
    scale = train.square().mean().sqrt()
    save_file({TRAIN: (train / scale).contiguous(), HELD_OUT: (held_out / scale).contiguous()}, path)


def mixtures(d_in: int, tokens: int) -> Tensor:
    """[tokens, d_in]: some two dozen of four times as many features as dimensions on each, a mean and noise."""
    truth = toy(1, features=OVERCOMPLETE * d_in, d_in=d_in, fired=FIRED)
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(d_in, generator=generator)
    return torch.cat([_lot(truth, seed, generator) for seed in range(tokens // LOT)]) + mean


LOT = 4096


def _lot(truth: Truth, seed: int, generator: torch.Generator) -> Tensor:
    x, _ = truth.sample(LOT, seed)
    return x + NOISE * x.std() * torch.randn(x.shape, generator=generator)


def main() -> None:
    """``python -m bench.train.pools FILE D_IN BATCHES``: batches of 4,096, and one that is held out."""
    path, d_in, batches = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    x = mixtures(d_in, LOT * (batches + 1))
    write(path, x[:-LOT], x[-LOT:])


if __name__ == "__main__":
    main()
