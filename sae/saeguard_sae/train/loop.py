"""The training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from saeguard_sae.dictionary import Dictionary
from saeguard_sae.train.learner import Learner
from saeguard_sae.train.settings import TrainSettings

logger = logging.getLogger(__name__)


def train(settings: TrainSettings, activations: Tensor, before: Tensor | None = None) -> Dictionary:
    """activations [tokens, d_in], BOS left out -> the trained SAE, ready to be served.

    ``before`` [tokens] is the row of the token before, a row's own index where there is none; asked for by smoothness.
    """
    if settings.smooth_weight and before is None:
        raise ValueError("smooth_weight needs to know each token's predecessor")
    learner = Learner(settings, activations)
    optimiser = torch.optim.Adam(learner.parameters(), lr=settings.learning_rate, fused=True)
    batches = shuffled(len(activations), settings.batch, settings.seed)
    for step in range(settings.steps):
        rows = next(batches)
        earlier = activations[before[rows]] if before is not None and settings.smooth_weight else None
        loss = _step(learner, optimiser, activations[rows], earlier, step)
        if step % 500 == 0 or step == settings.steps - 1:
            dead = int((learner.silent > settings.dead_after_steps).sum())
            logger.info("SAE step %d of %d: loss %.4f, %d dead", step, settings.steps, loss, dead)
    return learner.export()


def _step(learner: Learner, optimiser: torch.optim.Optimizer, batch: Tensor, before: Tensor | None, step: int) -> float:
    for group in optimiser.param_groups:
        group["lr"] = learner.settings.rate(step)
    loss = learner.loss(batch, step, before)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    learner.project_gradient()
    torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    optimiser.step()
    learner.normalise()
    return loss.item()


def shuffled(tokens: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Without end: rows [batch] of ``tokens`` rows, each once before any twice."""
    if tokens < batch:
        raise ValueError(f"a batch of {batch} tokens needs as many activations, got {tokens}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(tokens, generator=generator)
        for start in range(0, tokens - batch + 1, batch):
            yield order[start : start + batch]
