"""How much is measured, and on how much text."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from saeguard_sae.train.errors import TrainError

DEAD_TOKENS = 1_000_000
"""Below this many tokens a rare feature passes for a dead one: the dead share is then an upper bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSettings:
    """One evaluation; every token count is of ordinary tokens, which special ones and padding are not.

    Raises:
        TrainError: names the field and what is allowed.
    """

    tokens: int = DEAD_TOKENS
    """On which what fires and what is reconstructed is measured."""
    loss_tokens: int = 65_536
    """Of these, on whose rows the model is run with the site replaced: four more passes of the model."""
    fit_tokens: int = 16_384
    """From every fifth of the first rows, not measured on: they give the mean that ablation puts in place, and fit the
    frozen baseline."""
    outlier_norm: float = 10.0
    """Leave out tokens whose norm is above this many times the median where the SAE reads or in what it must reproduce;
    0 keeps them."""
    examples: int = 12
    """Features whose strongest contexts are shown."""
    contexts: int = 5
    """Contexts shown of each."""
    probe_k: tuple[int, ...] = (1, 2, 5, 20)
    """Numbers of features that a probe may use."""
    seed: int = 7_001
    """Of the frozen baseline and of the probes' split."""

    def __post_init__(self) -> None:
        for name in ("tokens", "loss_tokens", "fit_tokens", "contexts"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.outlier_norm != 0 and not 1 < self.outlier_norm < inf:
            raise TrainError(f"outlier_norm must be above 1, or 0 for none, got {self.outlier_norm:g}")
        if self.examples < 0:
            raise TrainError(f"examples must be at least 0, got {self.examples}")
        if not self.probe_k or min(self.probe_k) < 1 or len(set(self.probe_k)) < len(self.probe_k):
            raise TrainError(f"probe_k must be different numbers of at least 1, got {self.probe_k}")
