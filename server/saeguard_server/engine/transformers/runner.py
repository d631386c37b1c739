"""Runs the model: one forward pass of whatever the batch is. Holds no queues.

Everything here runs in inference mode, which the engine's thread enters once.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.protocol import InspectTask
from saeguard_server.engine.stock.model import LoadedModel
from saeguard_server.engine.tables import SteeringTables, Tallies
from saeguard_server.engine.transformers.attention import KvShape, PagedAttention
from saeguard_server.engine.transformers.batch import Seats
from saeguard_server.engine.transformers.blocks import BLOCK
from saeguard_server.engine.transformers.capture import Capture
from saeguard_server.engine.transformers.network import Network
from saeguard_server.engine.transformers.sampler import Picked, Sampler
from saeguard_server.engine.transformers.scheduler import PromptPart
from saeguard_server.engine.transformers.sequence import Sequence


class Runner:
    """The model with KV memory of ``blocks`` blocks, edit tables and sampler; one row of each table per slot."""

    def __init__(
        self, model: LoadedModel, network: Network, saes: Mapping[str, LoadedSae], slots: int, blocks: int
    ) -> None:
        config, self.device = model.network.config, model.device
        self.network = network
        self.tables = SteeringTables(saes, slots, self.device)
        shape, places = KvShape.of(config), (blocks + 1) * BLOCK
        attention = PagedAttention(shape, places, model.network.dtype, self.device, network.kernel)
        network.attach(attention, self.tables)
        self.sampler = Sampler(slots, model.info.max_context, config.vocab_size, self.device)
        is_special = torch.zeros(config.vocab_size, dtype=torch.bool, device=self.device)
        special = [one for one in model.tokenizer.special_ids if one < config.vocab_size]
        is_special[torch.tensor(special, dtype=torch.int64, device=self.device)] = True
        self.seats = Seats(slots, model.info.max_context, is_special)

    def join(self, sequence: Sequence, tallies: Tallies | None) -> None:
        """Prepares a request's slot; ``tallies``: what its edits counted on tokens that are not read again."""
        slot, task = sequence.slot, sequence.task
        self.seats.take(slot, sequence.computed, sequence.blocks)
        if isinstance(task, InspectTask):
            self.tables.write(slot, task.steering)
            return
        self.tables.write(slot, task.steering, task.watch)
        if tallies is not None:
            self.tables.resume(slot, tallies)
        self.sampler.write(
            slot, task.sampling, task.seed, task.max_new_tokens, sequence.tokens, sequence.generated_tokens
        )

    def leave(self, slot: int) -> None:
        """Frees a slot; nothing of its request stays."""
        self.tables.clear(slot)
        self.sampler.clear(slot)

    def forward(
        self,
        running: tuple[int, ...],
        parts: Many[PromptPart],
        ending: Many[PromptPart],
        scored: Many[PromptPart],
        capture: Capture,
    ) -> Tensor:
        """One pass; see ``Seats.build`` -> logits [M, vocabulary], float32; ``capture`` sees what it was asked for."""
        one = self.seats.build(running, parts, ending, scored)
        self.tables.watch = capture.begin(parts, one.spans)
        return self.network.forward(one)

    def pick(self, logits: Tensor, slots: tuple[int, ...]) -> Picked:
        """logits [B, vocabulary] of B slots -> their next tokens."""
        return self.sampler.pick(logits, slots)
