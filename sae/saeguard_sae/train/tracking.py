"""What is counted while an SAE learns: means for the log, and which features have been silent for how long."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard_sae.train.settings import SaeSettings


@dataclass(frozen=True, slots=True)
class Progress:
    """Means over the steps since it was asked for last."""

    steps: int
    """All so far."""
    tokens: int
    """All so far."""
    loss: float
    """In shares of variance, sparsity included."""
    l0: float
    fvu: float
    """Of the batches as they were trained on: share of variance left unexplained."""
    dead_share: float
    learning_rate: float


class Tracking:
    """Stays on the device between two calls of ``progress``."""

    def __init__(self, settings: SaeSettings, device: torch.device) -> None:
        self._settings = settings
        self.silent = torch.zeros(settings.d_sae, dtype=torch.int32, device=device)
        """Steps since each feature last fired."""
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        """Steps, losses, L0s and FVUs since they were asked for."""

    def dead(self) -> Tensor:
        """bool [d_sae]"""
        return self.silent > self._settings.dead_after_steps

    def note(self, fired: Tensor, loss: Tensor, l0: Tensor, fvu: Tensor) -> None:
        """One step; ``fired`` [d_sae] is what is not zero where a feature fired."""
        self.silent.add_(1).masked_fill_(fired != 0, 0)
        self._sums += torch.stack([torch.ones_like(self._sums[0]), loss.double(), l0.double(), fvu.double()])

    def progress(self, steps: int) -> Progress:
        """See ``Learner.progress``."""
        count, loss, l0, fvu = self._sums.tolist()
        self._sums.zero_()
        count = max(count, 1.0)
        return Progress(
            steps,
            steps * self._settings.batch,
            loss / count,
            l0 / count,
            fvu / count,
            float(self.dead().float().mean()),
            self._settings.rate(max(steps - 1, 0)),
        )

    def state(self) -> dict[str, Tensor]:
        """See ``Learner.state``."""
        return {"silent": self.silent, "sums": self._sums}
