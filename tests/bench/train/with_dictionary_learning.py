"""dictionary_learning: its trainers' ``update``, which is all that its loop does with a batch.

The loop itself makes its trainers anew whenever it is called, and on a CPU turns bfloat16 off; so autocast is put
around ``update`` here, as the loop does on a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor

from bench.train.plan import Plan, Pool
from bench.train.side import Batches, run

TRAINERS = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer, "matryoshka": MatryoshkaBatchTopKTrainer}


class DictionaryLearning:
    """Its trainer; of its defaults, only two waits of a thousand steps are shortened to what a short run allows."""

    def __init__(self, plan: Plan, pool: Pool) -> None:
        own: dict[str, Any] = {}
        if plan.architecture == "matryoshka":
            starts = (0, *plan.widths)
            own["group_fractions"] = [
                (end - start) / plan.d_sae for start, end in zip(starts, plan.widths, strict=False)
            ]
        self._trainer = TRAINERS[plan.architecture](
            steps=plan.steps,
            activation_dim=pool.d_in,
            dict_size=plan.d_sae,
            k=plan.k,
            layer=0,
            lm_name="none",
            lr=plan.learning_rate or None,
            warmup_steps=plan.warm_up,
            decay_start=plan.steps - plan.decay if plan.decay else None,
            threshold_start_step=min(1000, plan.steps // 2),
            seed=plan.seed,
            device="cpu",
            **own,
        )
        self._half = plan.precision == "bfloat16"
        self._done = 0

    def train(self, batches: Batches) -> None:
        """An update for each."""
        for x in batches:
            with self._autocast():
                self._trainer.update(self._done, x)
            self._done += 1

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As it is used: with its threshold where k counts over a batch."""
        reconstruction, features = self._trainer.ae(x, output_features=True)
        return features, reconstruction

    def decoder(self) -> Tensor:
        """[d_sae, d_in]; its top-k keeps the transpose."""
        ae = self._trainer.ae
        return ae.decoder.weight.T if hasattr(ae, "decoder") else ae.W_dec

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self._half else nullcontext()


if __name__ == "__main__":
    run(DictionaryLearning)
