"""What every side trains, in plain values, for any process; and the file with the activations that all share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

TRAIN, HELD_OUT = "train", "held_out"
"""Tensors of a pool, both [tokens, d_in]: what is trained on in batches, over and over, and what is not."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One SAE and its training.

    Attributes:
        pool: file with the activations.
        widths: of a matryoshka, ascending, the last is d_sae.
        precision: "float32" or "bfloat16", for ours also "int8"; a library's is its own option, or autocast around its
            step.
        steps: of the whole training; what a learning rate falls over.
        learning_rate: 0: what the side would take for this width.
        warm_up: steps in which it rises.
        decay: steps, the last ones, in which it falls to 0.
    """

    pool: str
    d_sae: int
    k: int
    architecture: str
    widths: tuple[int, ...] = ()
    precision: str
    threads: int = 1
    batch: int
    steps: int
    learning_rate: float = 0.0
    warm_up: int = 0
    decay: int = 0
    seed: int = 0


class Pool:
    """Batches [batch, d_in] in the same order for everybody, and held-out activations [tokens, d_in]."""

    def __init__(self, path: str) -> None:
        # Copied: pages of a file count as memory only once they are read, and would be taken for the trainer's.
        tensors = {name: tensor.clone() for name, tensor in load_file(Path(path)).items()}
        self.train, self.held_out = tensors[TRAIN], tensors[HELD_OUT]

    def batches(self, size: int) -> Iterator[Tensor]:
        """Without end; the pool holds a whole number of them."""
        while True:
            yield from self.train.split(size)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.train.shape[1]


def unexplained(x: Tensor, reconstruction: Tensor) -> float:
    """Share of the variance of x [tokens, d_in] that the reconstruction leaves, summed over tokens."""
    error = (x - reconstruction).double().square().sum()
    return float(error / (x - x.mean(0)).double().square().sum())


def dense(values: Tensor, index: Tensor, d_sae: int) -> Tensor:
    """values, index [tokens, k] -> [tokens, d_sae]."""
    return torch.zeros(len(values), d_sae, dtype=values.dtype).scatter(1, index.long(), values)
