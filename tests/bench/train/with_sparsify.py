"""sparsify: ``Trainer.fit``, its whole loop, over a model whose only layer hands out the activations.

Its optimiser is its default, sign gradient descent without a schedule, unless a learning rate is given: then Adam.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SaeConfig, TrainConfig
from sparsify.trainer import Trainer
from torch import Tensor, nn

from bench.train.plan import Plan, Pool, dense
from bench.train.side import Batches, run

CONTEXT = 128
LAYER = "layers.0"


class Stub(nn.Module):
    """A language model to the trainer."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self.batches: Batches | None = None
        self._d_in = d_in

    @property
    def base_model(self) -> Stub:
        """Itself."""
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """[sequences, context, d_in], whatever the tokens."""
        if self.batches is None:
            return self.layers[0](torch.zeros(*input_ids.shape, self._d_in))
        return self.layers[0](next(self.batches).unflatten(0, tuple(input_ids.shape)))


class Tokens:
    """A dataset of as many sequences as it says, all the same."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._ids = torch.zeros(CONTEXT, dtype=torch.long)

    def __len__(self) -> int:
        return self._sequences

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids}

    def select(self, rows: range) -> Tokens:
        """As many as those rows."""
        return Tokens(len(rows))


class Sparsify:
    """Its trainer over its SAE."""

    def __init__(self, plan: Plan, pool: Pool) -> None:
        if plan.architecture != "topk":
            raise ValueError("sparsify has topk alone")
        sequences = plan.batch // CONTEXT
        settings = TrainConfig(
            SaeConfig(num_latents=plan.d_sae, k=plan.k),
            batch_size=sequences,
            optimizer="adam" if plan.learning_rate else "signum",
            lr=plan.learning_rate or None,
            lr_warmup_steps=plan.warm_up,
            hookpoints=[LAYER],
            init_seeds=[plan.seed],
            save_every=10**9,
            log_to_wandb=False,
            save_dir=tempfile.gettempdir(),
        )
        self._stub = Stub(pool.d_in)
        # One batch more than is trained: at the end of its data it would write a checkpoint.
        self._trainer = Trainer(settings, Tokens(sequences * (plan.steps + 1)), self._stub)
        self._half = plan.precision == "bfloat16"

    def train(self, batches: Batches) -> None:
        """Goes on where it left off."""
        self._stub.batches = batches
        with self._autocast():
            self._trainer.fit()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """With the averaged weights where its optimiser averages."""
        with _Averaged(self._trainer):
            values, index, _ = self._sae.encode(x)
            return dense(values, index, self._sae.num_latents), self._sae.decode(values, index)

    def decoder(self) -> Tensor:
        """[d_sae, d_in]."""
        with _Averaged(self._trainer):
            return self._sae.W_dec.detach().clone()

    @property
    def _sae(self) -> Any:
        return self._trainer.saes[LAYER]

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self._half else nullcontext()


class _Averaged:
    """Within: the weights that its checkpoints hold."""

    def __init__(self, trainer: Trainer) -> None:
        self._optimisers = [one for one in trainer.optimizers if isinstance(one, ScheduleFreeWrapper)]

    def __enter__(self) -> None:
        for one in self._optimisers:
            one.eval()

    def __exit__(self, *_: object) -> None:
        for one in self._optimisers:
            one.train()


if __name__ == "__main__":
    run(Sparsify)
