"""What a pass reads and where it is kept, against a plain list of every request's tokens and places."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard_server.engine.transformers.runner import ForwardPass, SlotState
from saeguard_server.engine.transformers.scheduler import Batch, PrefillChunk
from saeguard_server.engine.transformers.sequence import BLOCK, Sequence, blocks_for
from support.symbolic import generation

SLOTS, CONTEXT = 6, 80
IS_SPECIAL = torch.tensor([token % 5 == 0 for token in range(300)])


class Plain:
    """Requests in slots, each with blocks of its own."""

    def __init__(self, lengths: list[int], computed: list[int]) -> None:
        self.slots = SlotState(SLOTS, CONTEXT, IS_SPECIAL)
        self.sequences: list[Sequence] = []
        for slot, (length, known) in enumerate(zip(lengths, computed, strict=True)):
            one = generation(slot, [(slot * 31 + at * 7) % 300 for at in range(length)])
            one.slot, one.computed = slot, known
            # Numbers that go down: a place that was computed from a neighbour's block would show.
            one.blocks = [(slot + 1) * 20 - index for index in range(blocks_for(CONTEXT))]
            self.slots.join(slot, known, one.blocks)
            self.sequences.append(one)

    def build(
        self,
        running: tuple[int, ...],
        parts: list[PrefillChunk],
        ending: list[PrefillChunk] | None = None,
        scored: list[PrefillChunk] | None = None,
    ) -> ForwardPass:
        sequences = tuple(self.sequences[slot] for slot in running)
        return self.slots.build(Batch(sequences, tuple(parts), tuple(ending or ()), tuple(scored or ())))

    def place(self, slot: int, at: int) -> int:
        return self.sequences[slot].blocks[at // BLOCK] * BLOCK + at % BLOCK


@st.composite
def steps(draw: st.DrawFn) -> tuple[Plain, tuple[int, ...], list[PrefillChunk], list[PrefillChunk], list[PrefillChunk]]:
    lengths = draw(st.lists(st.integers(1, 60), min_size=SLOTS, max_size=SLOTS))
    computed = [draw(st.integers(0, length - 1)) for length in lengths]
    plain = Plain(lengths, computed)
    running = draw(st.lists(st.integers(0, SLOTS - 1), unique=True))
    parts = []
    for slot in draw(st.permutations([slot for slot in range(SLOTS) if slot not in running])):
        end = draw(st.integers(computed[slot], lengths[slot]))
        if end > computed[slot]:
            parts.append(PrefillChunk(plain.sequences[slot], computed[slot], end))
    ending = [part for part in parts if part.is_last and draw(st.booleans())]
    scored = [part for part in parts if draw(st.booleans())]
    return plain, tuple(running), parts, ending, scored


@given(steps())
@settings(max_examples=120, deadline=None)
def test_a_pass_reads_each_request_where_it_stands(
    step: tuple[Plain, tuple[int, ...], list[PrefillChunk], list[PrefillChunk], list[PrefillChunk]],
) -> None:
    plain, running, parts, ending, scored = step
    if not running and not parts:
        return
    plain.slots.choose(running, [200 + slot for slot in running])
    one = plain.build(running, parts, ending, scored)

    read = [(slot, plain.sequences[slot].computed, 200 + slot) for slot in running]
    for part in parts:
        slot, tokens = part.sequence.slot, part.sequence.tokens
        read += [(slot, at, tokens[at]) for at in range(part.start, part.end)]
    assert one.ids.tolist() == [[token for _, _, token in read]]
    assert one.positions.tolist() == [[at for _, at, _ in read]]
    assert one.write.tolist() == [plain.place(slot, at) for slot, at, _ in read]
    assert len(set(one.write.tolist())) == len(read)
    _keeps(one, running, parts, ending, scored, read)
    _sees(plain, one, read)


def _keeps(
    one: ForwardPass,
    running: tuple[int, ...],
    parts: list[PrefillChunk],
    ending: list[PrefillChunk],
    scored: list[PrefillChunk],
    read: list[tuple[int, int, int]],
) -> None:
    """Logits: of the running, of the last token of each ending part, and of every token that is scored."""
    where = {(slot, at): row for row, (slot, at, _) in enumerate(read)}
    ends = [where[part.sequence.slot, part.end - 1] for part in parts if part in ending]
    every = [where[part.sequence.slot, at] for part in parts if part in scored for at in range(part.start, part.end)]
    assert one.keep.tolist() == [*range(len(running)), *ends, *every]


def _sees(plain: Plain, one: ForwardPass, read: list[tuple[int, int, int]]) -> None:
    """Each token is in one group, with the places of all that its request has read."""
    seen = []
    assert one.rows.groups == tuple(reading.group for reading in one.readings)
    for reading in one.readings:
        group = reading.group
        rows = group.take(torch.arange(len(read)))
        for row, (slot, length) in enumerate(zip(group.slots, group.lengths, strict=True)):
            mine = rows[row, :length].tolist()
            seen += mine
            assert [read[at][:2] for at in mine] == [(slot, at) for at in group.positions[row, :length].tolist()]
            assert group.special[row, :length].tolist() == [bool(IS_SPECIAL[read[at][2]]) for at in mine]
            known = int(group.positions[row].max()) + 1
            assert reading.where[row, :known].tolist() == [plain.place(slot, at) for at in range(known)]
    assert sorted(seen) == list(range(len(read)))


def test_two_steps_go_on_where_the_first_ended() -> None:
    plain = Plain([40, 20], [0, 19])
    first, second = plain.sequences
    plain.build((), [PrefillChunk(first, 0, 17), PrefillChunk(second, 19, 20)])
    plain.slots.choose((1,), [77])
    one = plain.build((1,), [PrefillChunk(first, 17, 40)])
    assert one.positions.tolist() == [[20, *range(17, 40)]]
    plain.slots.choose((1, 0), [5, 6])
    one = plain.build((1, 0), [])
    assert (one.ids.tolist(), one.positions.tolist()) == ([[5, 6]], [[21, 40]])
    assert [reading.where.shape for reading in one.readings] == [(2, 48)]


def test_a_new_owner_of_a_slot_sees_nothing_of_the_last_ones_places() -> None:
    plain = Plain([60, 60], [59, 40])
    plain.slots.join(0, 0, [3])
    newcomer = generation(9, [1, 2, 3])
    newcomer.slot = 0
    one = plain.build((), [PrefillChunk(newcomer, 0, 3), PrefillChunk(plain.sequences[1], 40, 43)])
    assert one.write.tolist()[:3] == [3 * BLOCK + at for at in range(3)]
    nobodys = list(range(BLOCK))
    assert one.readings[0].where[0].tolist() == [3 * BLOCK + at for at in range(BLOCK)] + nobodys * 2


def test_blocks_that_came_later_are_placed_behind_the_first() -> None:
    plain = Plain([16], [15])
    plain.slots.join(0, 16, [2])
    plain.slots.place(0, [2, 9])
    one = plain.build((0,), [])
    assert one.write.tolist() == [9 * BLOCK]
    assert one.readings[0].where[0].tolist() == [*range(32, 48), *range(144, 160)]
