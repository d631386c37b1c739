"""Runs the model: a part of one prompt, or one decode step of every running request. Holds no queues.

Everything here runs in inference mode, which the engine's thread enters once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.loading import LoadedSae
from saeguard_sae.site import Site
from saeguard_server.engine.protocol import GenerateTask, InspectTask
from saeguard_server.engine.transformers.cache import SlotCache
from saeguard_server.engine.transformers.masks import Masks
from saeguard_server.engine.transformers.model import LoadedModel
from saeguard_server.engine.transformers.sampler import Picked, Sampler
from saeguard_server.engine.transformers.steering import Rows, SteeringHooks


class Runner:
    """The model with its KV cache, edit tables and sampler; one row of each per slot."""

    def __init__(self, model: LoadedModel, saes: Mapping[str, LoadedSae], slots: int, context: int) -> None:
        config, self.device = model.network.config, model.device
        self.network = model.network
        self.cache = SlotCache(config.num_hidden_layers, slots, context)
        is_additive = config._attn_implementation == "eager"
        self.masks = Masks(config, is_additive=is_additive, dtype=model.network.dtype)
        self.hooks = SteeringHooks(model.network, config, saes, slots, self.device)
        self.sampler = Sampler(slots, context, config.vocab_size, self.device)
        self._last = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._length = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._slots = torch.arange(slots, device=self.device)[:, None]
        self._is_special = torch.zeros(config.vocab_size, dtype=torch.bool, device=self.device)
        special = [one for one in model.tokenizer.special_ids if one < config.vocab_size]
        self._is_special[torch.tensor(special, dtype=torch.int64, device=self.device)] = True

    def join(self, slot: int, task: GenerateTask | InspectTask) -> None:
        """Prepares a free slot for a request."""
        self._length[slot] = 0
        if isinstance(task, InspectTask):
            self.hooks.write(slot, task.steering)
            return
        self.hooks.write(slot, task.steering, task.watch)
        self.sampler.write(slot, task.sampling, task.seed, task.max_new_tokens, task.tokens)

    def leave(self, slot: int, length: int) -> None:
        """Frees the slot of a request of ``length`` tokens; nothing of it stays."""
        self.hooks.clear(slot)
        self.sampler.clear(slot)
        self.cache.wipe(slot, length)

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a request of ``length`` computed tokens to a free slot."""
        self.cache.move(source, target, length)
        self.hooks.move(source, target)
        self.sampler.move(source, target)
        self._last[target], self._length[target] = self._last[source], self._length[source]

    def read(
        self,
        slot: int,
        tokens: list[int],
        start: int,
        *,
        every_logit: bool = False,
        watch: Callable[[Site, Tensor], None] | None = None,
    ) -> Tensor:
        """Reads a part of a prompt at positions ``start`` on -> logits [1 or T, vocabulary], float32."""
        ids = torch.tensor([tokens], device=self.device)
        end = start + len(tokens)
        positions = torch.arange(start, end, device=self.device)[None]
        self.hooks.watch = watch
        try:
            logits = self._forward(ids, slice(slot, slot + 1), positions, end, keep=0 if every_logit else 1)
        finally:
            self.hooks.watch = None
        self._length[slot] = end
        return logits[0]

    def decode(self, count: int, length: int) -> Tensor:
        """Reads the last token of the first ``count`` slots -> [count, vocabulary]; ``length``: of the longest."""
        slots = slice(0, count)
        positions = self._length[slots, None]
        logits = self._forward(self._last[slots, None], slots, positions, length, keep=1)
        self._length[slots] += 1
        return logits[:, -1]

    def pick(self, logits: Tensor, slots: slice) -> Picked:
        """logits [B, vocabulary] of B consecutive slots -> their next tokens, which the next decode step reads."""
        picked = self.sampler.pick(logits, slots)
        self._last[slots] = picked.token.clamp_min(0)
        return picked

    def _forward(self, ids: Tensor, slots: slice, positions: Tensor, length: int, keep: int) -> Tensor:
        window = self.cache.window
        window.slots, window.length = slots, length
        window.rows, window.positions = self._slots[slots], positions
        self.hooks.begin(Rows(slots, positions, self._is_special[ids]))
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": self.masks.build(positions, length),
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": keep,
        }
        logits: Tensor = self.network(**arguments).logits
        self.hooks.check()
        return logits.float()
