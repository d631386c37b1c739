"""How an SAE is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """A Matryoshka BatchTopK run; plain BatchTopK is ``widths=(d_sae,)``."""

    d_sae: int
    """Number of features."""
    k: int
    """Features that fire on a token, on average over a batch."""
    widths: tuple[int, ...] = ()
    """Prefixes of the features that must each reconstruct alone, ascending, the last is d_sae; empty: d_sae only."""
    steps: int
    batch: int = 1024
    """Tokens of a step."""
    learning_rate: float = 1e-3
    warm_up: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the steps, the last ones, in which it falls to 0."""
    aux_weight: float = 1 / 32
    """Weight of the loss by which dead features learn the error of the live ones; 0 turns it off."""
    dead_after: float = 0.05
    """A feature is dead when silent for this share of the run's tokens, so that short runs revive features too."""
    smooth_weight: float = 0.0
    """Weight by which the first level's features should change little from a token to the next, so that they stand for
    what lasts (a language, a subject) and leave single tokens to others; after Temporal SAEs, Bhalla et al. 2025."""
    threshold_memory: float = 0.99
    """Memory of the running mean of the batch threshold, which becomes the exported one."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k must be 1 to d_sae ({self.d_sae}), got {self.k}")
        if self.levels[-1] != self.d_sae or any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"widths must rise to d_sae ({self.d_sae}), got {self.widths}")
        if min(self.levels[0], self.steps, self.batch) < 1:
            raise ValueError("widths, steps and batch must be positive")

    @property
    def levels(self) -> tuple[int, ...]:
        """The widths, at least one."""
        return self.widths or (self.d_sae,)

    @property
    def dead_after_steps(self) -> int:
        """Steps of silence after which a feature counts as dead."""
        return max(1, round(self.dead_after * self.steps))

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay."""
        rise = (step + 1) / max(1.0, self.warm_up * self.steps)
        fall = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, rise, fall)
