"""What counts as equal to a reference library: 2e-5 relative to each token's largest value."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def close(ours: Tensor, theirs: Tensor | np.ndarray[Any, Any]) -> None:
    """ours [..., n], theirs of as many values: a token may differ by 2e-5 of its largest value, or of 1.

    Raises:
        AssertionError: one differs by more.
    """
    wanted = torch.as_tensor(theirs).double().reshape(ours.shape)
    scale = wanted.abs().amax(dim=-1, keepdim=True).clamp_min(1.0)
    assert float(((ours.double() - wanted).abs() / scale).max()) <= 2e-5
