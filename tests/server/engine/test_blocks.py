"""Blocks against a plain model: who holds what, what is known, and what is forgotten first."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from saeguard_server.engine.transformers.sequence import BLOCK, BlockPool, block_key, blocks_for

COUNT = 12
KEYS = [bytes([one]) for one in range(8)]


class Holding(RuleBasedStateMachine):
    """Random holders of blocks with a model of each block's holders, key and note."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockPool(COUNT)
        self.holders: list[list[int]] = []
        self.known: dict[bytes, int] = {}
        self.notes: dict[int, str] = {}
        self.unused: list[int] = []
        """Known blocks that nobody holds, the longest unused first."""

    def _held(self) -> set[int]:
        return {block for one in self.holders for block in one}

    @precondition(lambda self: self.blocks.available)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        held, free = self._held(), COUNT - len(self._held()) - len(self.unused)
        count = data.draw(st.integers(1, self.blocks.available))
        taken = self.blocks.allocate(count)
        assert len(set(taken)) == count
        assert set(taken) <= set(range(1, COUNT + 1)) - held
        forgotten = self.unused[: max(count - free, 0)]
        assert set(forgotten) <= set(taken), "a block was forgotten while others were unused for longer"
        assert not set(taken) & set(self.unused[len(forgotten) :]), "more was forgotten than had to be"
        self.unused = self.unused[len(forgotten) :]
        self.known = {key: block for key, block in self.known.items() if block not in forgotten}
        self.notes = {block: note for block, note in self.notes.items() if block not in forgotten}
        self.holders.append(taken)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        gone = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.blocks.free(gone)
        left, known = self._held(), set(self.known.values())
        self.unused += [block for block in reversed(gone) if block in known and block not in left]

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), key=st.sampled_from(KEYS), note=st.booleans())
    def know(self, data: st.DataObject, key: bytes, note: bool) -> None:
        block = data.draw(st.sampled_from(sorted(self._held())))
        self.blocks.cache(block, key)
        if key not in self.known and block not in self.known.values():
            self.known[key] = block
        if note:
            self.blocks.note(block, f"about {block}")
            if block in self.known.values():
                self.notes[block] = f"about {block}"

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True), share=st.booleans())
    def find(self, keys: list[bytes], share: bool) -> None:
        missing = next((at for at, key in enumerate(keys) if key not in self.known), len(keys))
        wanted = [self.known[key] for key in keys[:missing]]
        found = self.blocks.find_cached(keys)
        assert found == wanted
        assert self.blocks.idle_among(found) == len(set(found) & set(self.unused))
        if share and found:
            self.blocks.share(found)
            self.unused = [block for block in self.unused if block not in found]
            self.holders.append(found)

    @invariant()
    def they_add_up(self) -> None:
        assert self.blocks.in_use == len(self._held())
        assert self.blocks.in_use + self.blocks.available == self.blocks.count == COUNT

    @invariant()
    def notes_are_of_known_blocks(self) -> None:
        assert {at: self.blocks.note_of(at) for at in range(COUNT + 1) if self.blocks.note_of(at)} == self.notes

    def teardown(self) -> None:
        for one in self.holders:
            self.blocks.free(one)
        assert (self.blocks.in_use, self.blocks.available) == (0, COUNT)


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_what_follows_is_forgotten_before_what_precedes_it() -> None:
    blocks = BlockPool(3)
    held = blocks.allocate(3)
    for block, key in zip(held, KEYS, strict=False):
        blocks.cache(block, key)
    blocks.free(held)
    blocks.allocate(1)
    assert blocks.find_cached(KEYS[:3]) == held[:2]


def test_a_key_tells_what_was_read_before_and_how_it_was_steered() -> None:
    tokens = list(range(BLOCK))
    variants = [
        block_key(b"", tokens, b""),
        block_key(b"", tokens, b"s" * 16),
        block_key(b"p" * 16, tokens, b""),
        block_key(b"p" * 16, tokens, b"s" * 16),
        block_key(b"", [*tokens[:-1], 99], b""),
        block_key(b"", [*tokens[:-1], 2**40], b""),
        block_key(b"", tokens[::-1], b""),
    ]
    assert len(set(variants)) == len(variants)
    assert block_key(b"", tuple(tokens), b"") == variants[0]


def test_blocks_for_some_tokens() -> None:
    assert [blocks_for(one) for one in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK)] == [0, 1, 1, 1, 2, 5]
