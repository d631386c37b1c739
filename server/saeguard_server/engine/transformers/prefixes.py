"""Reuse of what was read before: blocks of KV by what was read and how the model was steered meanwhile.

A reused token passes no edit again, so the counts of the edits are kept beside the blocks at which a pass ended, and a
steered request goes on from such a block only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from saeguard_server.engine.protocol import GenerateTask, ResolvedEdit, ResolvedGuard, Steering
from saeguard_server.engine.tables import Tallies
from saeguard_server.engine.transformers.blocks import BLOCK, Blocks, block_key
from saeguard_server.engine.transformers.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Counted:
    """What a steering counted up to the end of a block."""

    steering: Steering
    tallies: Tallies


@dataclass(frozen=True, slots=True)
class Hit:
    """Blocks that a request need not read again, and what its edits counted on them."""

    blocks: tuple[int, ...] = ()
    tallies: Tallies | None = None


class Prefixes:
    """Finds and learns prefixes among ``blocks``.

    Args:
        tally: what the edits in a slot counted so far.
    """

    def __init__(self, blocks: Blocks, tally: Callable[[int], Tallies]) -> None:
        self._blocks, self._tally = blocks, tally

    def find(self, sequence: Sequence) -> Hit:
        """What a waiting request can reuse; at least its last token is left to read."""
        if not can_reuse(sequence):
            return Hit()
        most = (len(sequence.tokens) - 1) // BLOCK
        self._extend(sequence, most)
        found = self._blocks.find(sequence.keys[:most])
        while found:
            if not is_steered(sequence, len(found) * BLOCK):
                return Hit(tuple(found))
            counted = self._blocks.note_of(found[-1])
            if counted is not None and counted.steering == sequence.task.steering:
                return Hit(tuple(found), counted.tallies)
            found.pop()
        return Hit()

    def learn(self, sequence: Sequence) -> None:
        """After a pass: the blocks that it filled can be found."""
        if not isinstance(sequence.task, GenerateTask):
            return
        full = sequence.computed // BLOCK
        if full > sequence.learned:
            self._extend(sequence, full)
            for index in range(sequence.learned, full):
                self._blocks.know(sequence.blocks[index], sequence.keys[index])
            sequence.learned = full
            self._count(sequence)

    def _count(self, sequence: Sequence) -> None:
        """Keeps the counts, if this is where a pass ended and they are those of the edits alone."""
        if sequence.computed % BLOCK or not can_reuse(sequence) or not is_steered(sequence, sequence.computed):
            return
        counted = Counted(sequence.task.steering, self._tally(sequence.slot))
        self._blocks.note(sequence.blocks[sequence.learned - 1], counted)

    def _extend(self, sequence: Sequence, count: int) -> None:
        keys, steering = sequence.keys, sequence.task.steering
        for index in range(len(keys), count):
            start = index * BLOCK
            parent = keys[-1] if keys else b""
            keys.append(block_key(parent, sequence.tokens[start : start + BLOCK], _active(steering, start)))


def can_reuse(sequence: Sequence) -> bool:
    """Whether a request wants nothing of its prompt's tokens but their KV."""
    task = sequence.task
    return isinstance(task, GenerateTask) and not task.watch and not task.sampling.prompt_logprobs


def is_steered(sequence: Sequence, end: int) -> bool:
    """Whether an edit's or guard's scope holds any of the tokens before position ``end``."""
    steering = sequence.task.steering
    scopes: tuple[ResolvedEdit | ResolvedGuard, ...] = (*steering.edits, *steering.guards)
    return any(one.first < min(end, one.last) for one in scopes)


def _active(steering: Steering, start: int) -> bytes:
    """What is applied to the tokens of the block that begins at ``start``; empty where nothing is."""
    end = start + BLOCK
    here = [edit for edit in steering.edits if edit.first < end and edit.last > start]
    guards = [(one.first, min(one.last, end)) for one in steering.guards]
    if any(first < end and last > start for first, last in guards) or any(edit.gate is not None for edit in here):
        # What a guard holds in this block follows from all that it has seen since it began.
        what: object = steering.digest, guards, [(edit.first, min(edit.last, end)) for edit in here]
    elif here:
        what = [_part(edit, start) for edit in here], steering.max_relative_edit
    else:
        return b""
    return hashlib.blake2b(repr(what).encode(), digest_size=16).digest()


def _part(edit: ResolvedEdit, start: int) -> tuple[object, ...]:
    first, last = max(edit.first - start, 0), min(edit.last - start, BLOCK)
    return edit.sae, edit.feature, tuple(edit.affine), edit.special, first, last, edit.is_shadow, edit.is_limited
