"""One forward pass on the device: which tokens it reads, where their KV goes, what each request sees."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeguard_sae.edit_table import Group, Rows, RowSpan
from saeguard_server.engine.transformers.attention import Reading
from saeguard_server.engine.transformers.blocks import BLOCK, blocks_for
from saeguard_server.engine.transformers.scheduler import PromptPart

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """N tokens of a forward pass: first one of each generating request, then parts of prompts."""

    ids: Tensor
    """int64 [1, N]"""
    positions: Tensor
    """int64 [1, N], each in its request."""
    write: Tensor
    """int64 [N], the place in KV memory that keeps each."""
    spans: tuple[RowSpan, ...]
    """Of the parts, in their order."""
    rows: Rows
    readings: tuple[Reading, ...]
    keep: Tensor
    """int64 [M], the tokens whose logits are wanted: one of each request that chooses its next token, then those whose
    prompt is scored."""


class Seats:
    """Per slot, on the host: the last token, how far the model has read, and the blocks that hold its KV.

    Args:
        is_special: bool [vocabulary] on the device.
    """

    def __init__(self, slots: int, context: int, is_special: Tensor) -> None:
        self._last = np.zeros(slots, np.int64)
        self._computed = np.zeros(slots, np.int64)
        self._blocks = np.zeros((slots, blocks_for(context) + 1), np.int64)
        self._is_special, self._device = is_special, is_special.device
        self._inside = np.arange(BLOCK, dtype=np.int64)

    def take(self, slot: int, computed: int, blocks: Many[int]) -> None:
        """A request sits down of which ``computed`` tokens are read."""
        self._computed[slot], self._blocks[slot] = computed, 0
        self.place(slot, blocks)

    def place(self, slot: int, blocks: Many[int]) -> None:
        """Its blocks."""
        self._blocks[slot, : len(blocks)] = blocks

    def choose(self, slots: Many[int], tokens: Many[int]) -> None:
        """What the generating requests read next."""
        self._last[list(slots)] = tokens

    def build(
        self,
        running: tuple[int, ...],
        parts: Many[PromptPart],
        ending: Many[PromptPart],
        scored: Many[PromptPart],
    ) -> Pass:
        """The pass that reads the last token of the running slots and these parts.

        Args:
            ending: those of the parts after which a request chooses its first token.
            scored: those of which every logit is wanted.
        """
        order = np.array(running, np.int64)
        spans, start = [], len(running)
        for part in parts:
            spans.append(RowSpan(part.sequence.slot, start, part.end - part.start))
            start += part.end - part.start
        owner = np.concatenate([order, *(np.full(one.length, one.slot) for one in spans)])
        ids = np.concatenate([self._last[order], *(one.sequence.tokens[one.start : one.end] for one in parts)])
        at = np.concatenate([self._computed[order], *(np.arange(one.start, one.end) for one in parts)])
        write = self._blocks[owner, at // BLOCK] * BLOCK + at % BLOCK
        keep = _kept(len(running), list(zip(parts, spans, strict=True)), ending, scored)
        self._computed[order] += 1
        for part in parts:
            self._computed[part.sequence.slot] = part.end
        return self._on_device(running, spans, (ids, at, write, keep))

    def _on_device(self, running: tuple[int, ...], spans: list[RowSpan], host: tuple[Numbers, ...]) -> Pass:
        ids, at, write, keep = (torch.from_numpy(one.astype(np.int64)).to(self._device) for one in host)
        special = self._is_special[ids]
        groups = Rows.of(spans, at, special).groups
        if running:
            groups = (Group.singles(running, at, special), *groups)
        readings = tuple(Reading(group, self._where(group)) for group in groups)
        return Pass(ids[None], at[None], write, tuple(spans), Rows(groups), readings, keep)

    def _where(self, group: Group) -> Tensor:
        """Places [B, L] of all that the group's requests have read after this pass."""
        slots = np.array(group.slots, np.int64)
        longest = blocks_for(int(self._computed[slots].max()))
        blocks = self._blocks[slots, :longest]
        return torch.from_numpy((blocks[..., None] * BLOCK + self._inside).reshape(len(slots), -1)).to(self._device)


def _kept(
    running: int, pairs: list[tuple[PromptPart, RowSpan]], ending: Many[PromptPart], scored: Many[PromptPart]
) -> Numbers:
    ends = [span.start + span.length - 1 for part, span in pairs if part in ending]
    every = [np.arange(span.start, span.start + span.length) for part, span in pairs if part in scored]
    return np.concatenate([np.arange(running), np.array(ends, np.int64), *every])
