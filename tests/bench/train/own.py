"""Ours, with everything on: AuxK, the tracked threshold, and the figures of a running training."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from bench.train.plan import Plan, Pool
from bench.train.side import Batches, run
from saeguard_sae.train.learner import make_learner
from saeguard_sae.train.settings import Architecture, Precision, SaeSettings

LOG_EVERY = 10
"""Steps from one line of progress to the next; asking for it waits for the step."""


class Own:
    """Our learner as a run drives it."""

    def __init__(self, plan: Plan, pool: Pool) -> None:
        self._learner = make_learner(
            SaeSettings(
                d_sae=plan.d_sae,
                k=plan.k,
                architecture=cast(Architecture, plan.architecture),
                widths=plan.widths,
                steps=plan.steps,
                batch=plan.batch,
                warm_up=plan.warm_up / plan.steps,
                decay=plan.decay / plan.steps,
                precision=cast(Precision, plan.precision),
                learning_rate=plan.learning_rate,
                seed=plan.seed,
            ),
            pool.train[: plan.batch],
        )

    def train(self, batches: Batches) -> None:
        """A step for each, and progress now and then."""
        for x in batches:
            self._learner.step(x)
            if self._learner.steps % LOG_EVERY == 0:
                self._learner.metrics()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As exported."""
        dictionary = self._learner.export()
        features = dictionary.encode(x)
        return features, dictionary.decode(features, x)

    def decoder(self) -> Tensor:
        """[d_sae, d_in]."""
        return self._learner.export().W_dec


if __name__ == "__main__":
    run(Own)
