"""Which blocks of KV memory belong to whom, and which hold a prefix that somebody may need again. No tensors.

A full block is known by what was read and how the model was steered meanwhile; blocks that nobody holds stay known
until their memory is needed, the longest unused first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, abc
from typing import Any

BLOCK = 16
"""Tokens of one block."""


def block_key(parent: bytes, tokens: abc.Sequence[int], steering: bytes) -> bytes:
    """Identity of one block's KV: what was read up to its end, and how the model was steered meanwhile.

    Args:
        steering: what is applied to this block's tokens; empty where nothing is, so that everybody may share it.
    """
    return hashlib.blake2b(parent + steering + array("q", tokens).tobytes(), digest_size=16).digest()


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


class Blocks:
    """``count`` blocks, numbered from 1: block 0 is nobody's, and what padded places read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count, 0, -1))
        self._holders = [0] * (count + 1)
        self._key: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}
        self._notes: dict[int, Any] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be taken: free ones, and known ones that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Blocks that a request holds."""
        return self.count - self.available

    def take(self, count: int) -> list[int]:
        """So many blocks for one holder; there must be as many ``available``."""
        return [self._take() for _ in range(count)]

    def release(self, blocks: abc.Sequence[int]) -> None:
        """One holder less, the last of them first: a prefix is of no use without what precedes it."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._key:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def share(self, blocks: abc.Sequence[int]) -> None:
        """One holder more."""
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)

    def find(self, keys: abc.Sequence[bytes]) -> list[int]:
        """The known blocks of the longest beginning of these keys."""
        found = []
        for key in keys:
            if key not in self._by_key:
                break
            found.append(self._by_key[key])
        return found

    def idle_among(self, blocks: abc.Sequence[int]) -> int:
        """How many of them nobody holds: sharing those makes as many fewer available."""
        return sum(self._holders[block] == 0 for block in blocks)

    def know(self, block: int, key: bytes) -> None:
        """From now on this held block is found by its key; the first one with a key keeps it."""
        if key not in self._by_key and block not in self._key:
            self._key[block], self._by_key[key] = key, block

    def note(self, block: int, about: Any) -> None:
        """Keeps something beside a known block for as long as it is known."""
        if block in self._key:
            self._notes[block] = about

    def note_of(self, block: int) -> Any:
        """What is kept beside it; None where nothing is."""
        return self._notes.get(block)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._by_key[self._key.pop(block)]
            self._notes.pop(block, None)
        self._holders[block] = 1
        return block
