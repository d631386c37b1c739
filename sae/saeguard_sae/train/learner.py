"""One SAE while it learns, whatever its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from saeguard_sae.dictionary import Dictionary
from saeguard_sae.train.dense import DenseLearner
from saeguard_sae.train.parallel.mesh import ALONE, Mesh
from saeguard_sae.train.parallel.parts import check_parts
from saeguard_sae.train.settings import SaeSettings
from saeguard_sae.train.sparse import SparseLearner
from saeguard_sae.train.tracking import Progress


class Learner(Protocol):
    """Trains on batch after batch; what it counts stays on its device until it is asked for."""

    settings: SaeSettings
    steps: int
    """Taken so far."""

    def step(self, x: Tensor, target: Tensor | None = None, before: Tensor | None = None) -> None:
        """Learns from x [batch, d_in] in float32, as the model made it; of several processes each gets its own rows.

        Args:
            target: [batch, d_out] what a transcoder writes in its place.
            before: [batch, d_in] the activations one token earlier; where smoothness is asked for.
        """
        ...

    def progress(self) -> Progress:
        """How it goes; waits for the device."""
        ...

    def export(self) -> Dictionary:
        """What it has learnt, on activations as the model makes them. Where its features lie in several processes all
        of them must call it: the one that writes gets the whole, the others their part."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that the steps to come depend on; views of it, not copies.

        Where its features lie in several processes as ``export``: the one that writes gets copies of the whole, such as
        one process would have.
        """
        ...

    def align(self) -> None:
        """Of several processes with the same features all take the state of the first. On equal processors they have
        the same; on others differences of rounding would add up."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the state of the whole: on a CPU bit for bit with as many threads and processes."""
        ...


def make_learner(settings: SaeSettings, sample: Tensor, target: Tensor | None = None, *, mesh: Mesh = ALONE) -> Learner:
    """An untrained one.

    Args:
        sample: [tokens, d_in] activations that set scale and bias; its device is where it will learn.
        target: [tokens, d_out] what a transcoder should make of them.
        mesh: of the processes that train it together, each with the same sample.

    Raises:
        ValueError: a transcoder without a target, or the other way round; activations that are not finite or all equal;
            what several processes cannot train together.
        CannotCompile: compiled kernels were asked for and cannot be had.
    """
    if settings.is_transcoder != (target is not None):
        raise ValueError("a transcoder needs a target, and nothing else has one")
    for name, tensor in (("sample", sample), ("target", target)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds activations that are not finite")
    check_parts(settings, mesh)
    kind = SparseLearner if settings.is_selecting else DenseLearner
    made: Learner = kind(settings, sample.float(), None if target is None else target.float(), mesh)
    return made
