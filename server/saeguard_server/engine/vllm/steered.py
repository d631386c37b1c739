"""The requests that vLLM's worker steers or reads: their edits in the tables, what was counted, and their reports.

vLLM tells its workers neither when a request is preempted nor when it ends: a request that goes back was preempted, and
its counts go back with it; one that the runner no longer knows has ended, and is kept until it is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.edit_table import Rows, RowSpan
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Site
from saeguard_server.engine.protocol import Steering
from saeguard_server.engine.tables import SteeringTables, Tallies
from saeguard_server.engine.vllm.batch import Part
from saeguard_server.engine.vllm.inspecting import Inspection, Pickers
from saeguard_server.engine.vllm.orders import EditCounts, Order, OrderedPick, Readings, Report, read, steering
from saeguard_server.errors import InternalFailure

_log = logging.getLogger(__name__)

MAX_ENDED = 4096
"""Reports of ended requests that nobody asked for yet; the oldest go first."""
MAX_PAST = 512
"""Passes whose counts are kept of a request that may overrun its end."""
BLOCK = 16
"""Tokens that vLLM reuses at once, or a multiple of them."""


@dataclass(slots=True, eq=False)
class Live:
    """A request with edits, watched features or picks, as far as the tables of this process have them."""

    order: Order
    steering: Steering
    edits: tuple[int, ...]
    """Of the order's edits those here, in the order of ``steering``."""
    watch: tuple[int, ...]
    """Of the watched features those here."""
    inspection: Inspection
    slot: int = -1
    read: int = 0
    """Tokens that the model read for it, from the first one on."""
    passes: int = 0
    problem: str = ""
    state: Any = None
    """Of the request in vLLM's runner, by which its memory is found."""
    blew_up: Tensor | None = None
    """bool [], whether the model made something of it that is not finite; on the device."""
    tallies: Tallies = field(default_factory=Tallies)
    """What was counted, while it has no slot."""
    past: dict[int, Tallies] = field(default_factory=dict)
    """What was counted when it had read that many tokens."""
    kept: dict[int, Tallies] = field(default_factory=dict)
    """What was counted at the ends of blocks, of a request that vLLM may take up again there."""
    readings: list[Readings] = field(default_factory=list)

    def take_up(self, start: int) -> None:
        """It is read on from there: what comes before was found in memory, or it was preempted.

        The passes so far were made all the same.
        """
        if start > self.order.untouched and start not in self.kept:
            self.problem = f"vLLM read on at position {start} after {self.read} tokens"
        self.read, self.tallies, self.readings = start, self.kept.get(start, Tallies()), []
        self.past = {read: tallies for read, tallies in self.past.items() if read <= start}
        self.inspection = Inspection(self.inspection.picks)


class Steered:
    """What one worker process does for steered requests.

    Args:
        names: of all SAEs, in the order that orders number them.
        saes: those whose sites are in this process.
        slots: requests in one pass at most.
        wipe: called with the state of a request with edits that left the pass, if what it left in memory would do harm.
    """

    def __init__(
        self,
        names: Sequence[str],
        saes: Mapping[str, LoadedSae],
        slots: int,
        special: Tensor,
        device: torch.device,
        wipe: Callable[[Any], None],
    ) -> None:
        self.saes = saes
        # One more, to turn kept tallies into counts when every slot is taken.
        self.tables = SteeringTables(saes, slots + 1, device)
        self._names, self._special, self._wipe = tuple(names), special, wipe
        self._pickers = Pickers({at: saes[name] for at, name in enumerate(names) if name in saes})
        self._free, self._spare = list(range(slots)), slots
        self._live: dict[str, Live | None] = {}
        """By vLLM's name of the request; None for those that ask for nothing here."""
        self._ended: dict[int, Live] = {}
        self._now: list[tuple[Part, Live]] = []

    def begin(
        self, parts: list[Part], meet: Callable[[str], tuple[bytes | None, Any]], ids: Tensor, positions: Tensor
    ) -> None:
        """Before a pass over these parts, of which ids and positions [N] are the tokens.

        Args:
            meet: the order and the state in vLLM's runner of a request seen for the first time.
        """
        for part in parts:
            if part.request not in self._live:
                self._live[part.request] = self._meet(*meet(part.request))
        self._clean({part.request for part in parts})
        self._now = [(part, live) for part in parts if (live := self._live[part.request]) is not None]
        for part, live in self._now:
            self._resume(live, part)
        spans = [RowSpan(live.slot, part.first, part.length) for part, live in self._now]
        special = torch.isin(ids, self._special) if spans else torch.zeros(0, dtype=torch.bool)
        self.tables.begin(Rows.of(spans, positions, special))
        self.tables.watch = self._see if any(live.inspection.picks for _, live in self._now) else None

    def end(self, made: Iterable[Tensor]) -> None:
        """After it; ``made`` [N, width] each is what the model made of the tokens last."""
        bad = self._bad_tokens(made) if self._now else None
        for part, live in self._now:
            self._check(live)
            if bad is not None and live.edits:
                mine = bad[part.first : part.first + part.length].any()
                live.blew_up = mine if live.blew_up is None else live.blew_up | mine
            live.read, live.passes = part.start + part.length, live.passes + 1
            if live.order.may_overrun:
                live.past[live.read] = self.tables.tally(live.slot)
                if len(live.past) > MAX_PAST:
                    del live.past[next(iter(live.past))]
            if 0 < live.order.untouched < live.read and live.read % BLOCK == 0:
                live.kept[live.read] = self.tables.tally(live.slot)
            if live.watch and not live.problem:
                live.readings.append(self._readings(live, part.start))
        self._now = []

    def forget(self, known: Callable[[str], bool]) -> None:
        """Lets go of the requests that vLLM no longer knows; their reports are kept."""
        for request in [one for one in self._live if not known(one)]:
            live = self._live.pop(request)
            if live is not None:
                self._clean_one(live)
                self._give_up_slot(live)
                self._ended[live.order.uid] = live
        while len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def report(self, uid: int, tokens: int) -> Report:
        """What was done for a request while it read its first ``tokens`` tokens; asked for once."""
        live = self._ended.pop(uid, None) or self._find(uid)
        if live is None:
            return Report(problem="vLLM's worker knows nothing of this request")
        counted = live.past.get(tokens) if live.read != tokens else self._tallies(live)
        if counted is None:
            return Report(problem=f"vLLM's worker read {live.read} tokens of this request, not {tokens}")
        return Report(
            self._counts(live, counted),
            tuple(live.readings),
            tuple(live.inspection.found),
            live.passes if live.read == tokens else list(live.past).index(tokens) + 1 + live.passes - len(live.past),
            live.problem,
        )

    def _meet(self, given: bytes | None, state: Any) -> Live | None:
        if given is None:
            return None
        order = read(given)
        whole = steering(order, self._names)
        edits = tuple(at for at, one in enumerate(whole.edits) if one.sae in self.saes)
        here = Steering(tuple(whole.edits[at] for at in edits), whole.max_relative_edit)
        watch = tuple(at for at, (sae, _) in enumerate(order.watch) if self._names[sae] in self.saes)
        picks = tuple(one for one in order.picks if self._names[one.sae] in self.saes)
        return Live(order, here, edits, watch, Inspection(picks), state=state)

    def _resume(self, live: Live, part: Part) -> None:
        if part.start != live.read:
            self._give_up_slot(live)
            live.take_up(part.start)
        if live.slot < 0:
            live.slot = self._seat()
            self.tables.write(live.slot, live.steering, self._watched(live))
            self.tables.resume(live.slot, live.tallies)

    def _clean(self, present: set[str]) -> None:
        """Those who are not in the pass may have lost their memory to one who is."""
        for request, live in self._live.items():
            if live is not None and request not in present:
                self._clean_one(live)

    def _clean_one(self, live: Live) -> None:
        blew_up, live.blew_up = live.blew_up, None
        if blew_up is not None and bool(blew_up):
            self._wipe(live.state)

    @staticmethod
    def _bad_tokens(made: Iterable[Tensor]) -> Tensor:
        """bool [N], True for tokens of which something is not finite."""
        return torch.stack([~one.isfinite().all(dim=-1) for one in made]).any(dim=0)

    def _check(self, live: Live) -> None:
        try:
            self.tables.check(live.slot)
        except InternalFailure as err:
            live.problem = live.problem or err.message

    def _seat(self) -> int:
        """A free slot; of those who pause if need be."""
        if not self._free:
            busy = {id(live) for _, live in self._now}
            pausing = (one for one in self._live.values() if one is not None and one.slot >= 0 and id(one) not in busy)
            self._give_up_slot(next(pausing))
        return self._free.pop()

    def _give_up_slot(self, live: Live) -> None:
        if live.slot >= 0:
            live.tallies = self.tables.tally(live.slot)
            self.tables.clear(live.slot)
            self._free.append(live.slot)
            live.slot = -1

    def _find(self, uid: int) -> Live | None:
        return next((one for one in self._live.values() if one is not None and one.order.uid == uid), None)

    def _watched(self, live: Live) -> tuple[tuple[str, int], ...]:
        return tuple((self._names[live.order.watch[at][0]], live.order.watch[at][1]) for at in live.watch)

    def _tallies(self, live: Live) -> Tallies:
        return self.tables.tally(live.slot) if live.slot >= 0 else live.tallies

    def _counts(self, live: Live, counted: Tallies) -> tuple[EditCounts, ...]:
        self.tables.write(self._spare, live.steering, self._watched(live))
        try:
            self.tables.resume(self._spare, counted)
            found = self.tables.counts(self._spare, live.steering)
        finally:
            self.tables.clear(self._spare)
        return tuple(
            EditCounts(at, *(getattr(one, name) for name in EditCounts.__struct_fields__[1:]))
            for at, one in zip(live.edits, found, strict=True)
        )

    def _readings(self, live: Live, start: int) -> Readings:
        values = self.tables.readings(live.steering, self._watched(live), live.slot)
        return Readings(start, live.watch, values.float().cpu().numpy().tobytes())

    def _see(self, site: Site, x: Tensor) -> None:
        for part, live in self._now:
            for pick in live.inspection.picks:
                if self.saes[self._names[pick.sae]].site == site:
                    self._pick(live, pick, part.start, x[part.first : part.first + part.length])

    def _pick(self, live: Live, pick: OrderedPick, start: int, x: Tensor) -> None:
        try:
            self._pickers.see(live.inspection, pick, start, x)
        except Exception:  # one request's activations must not end another's
            _log.exception("activations could not be read")
            live.problem = live.problem or "the activations could not be read"
