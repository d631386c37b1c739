"""What OpenMOSS' formats share: the factors of training, and folding them into rows of weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeguard_sae.normalisation import Normalisation


class Scales(NamedTuple):
    """What takes activations to the scale of training, where it reads and where it writes; or how each token is."""

    inward: float
    outward: float
    normalisation: Normalisation = "none"


def scaled(rows: Tensor, by: Tensor) -> Tensor:
    """rows [d_sae, d] times by [d_sae], each row contiguous: copied once, whatever their layout in the file."""
    return torch.mul(rows, by[:, None], out=torch.empty(rows.shape))
