"""SAELens: ``SAETrainer.fit``, its whole loop, with its option for bfloat16."""

from __future__ import annotations

import torch
from sae_lens import BatchTopKTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from bench.train.plan import Plan, Pool
from bench.train.side import Batches, run

DEFAULT_RATE = 3e-4


class SaeLens:
    """Its trainer over its SAE, everything else as it comes."""

    def __init__(self, plan: Plan, pool: Pool) -> None:
        torch.manual_seed(plan.seed)
        self._sae = _sae(plan, pool.d_in)
        rate = plan.learning_rate or DEFAULT_RATE
        settings = SAETrainerConfig(
            total_training_samples=plan.batch * plan.steps,
            train_batch_size_samples=plan.batch,
            lr=rate,
            lr_end=rate / 10,  # as its runner sets it; its constant schedule does not look at it
            lr_warm_up_steps=plan.warm_up,
            lr_decay_steps=plan.decay,
            autocast=plan.precision == "bfloat16",
        )
        self._trainer = SAETrainer(settings, self._sae, iter(()))

    def train(self, batches: Batches) -> None:
        """Goes on where it left off: it asks for batches until there are no more."""
        self._trainer.data_provider = batches
        self._trainer.fit()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One of a batch's k is saved with its tracked threshold in place of the batch."""
        features, before = self._sae.encode_with_hidden_pre(x)
        if isinstance(self._sae, BatchTopKTrainingSAE):
            features = before * (before > self._sae.topk_threshold)
        return features, self._sae.decode(features)

    def decoder(self) -> Tensor:
        """[d_sae, d_in]."""
        return self._sae.W_dec


def _sae(plan: Plan, d_in: int) -> TopKTrainingSAE:
    if plan.architecture == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=plan.d_sae, k=plan.k))
    if plan.architecture == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=plan.d_sae, k=plan.k))
    assert plan.architecture == "matryoshka"
    settings = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=d_in, d_sae=plan.d_sae, k=plan.k, matryoshka_widths=list(plan.widths)
    )
    return MatryoshkaBatchTopKTrainingSAE(settings)


if __name__ == "__main__":
    run(SaeLens)
