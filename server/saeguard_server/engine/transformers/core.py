"""The engine's step: one forward pass of everybody's next tokens, and telling everyone what happened."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.load import LoadedModel
from saeguard_server.engine.protocol import GenerateTask, InspectTask
from saeguard_server.engine.transformers.output import HostTokens, OutputProcessor
from saeguard_server.engine.transformers.runner import Capture, Found, Network, Runner, is_out_of_memory
from saeguard_server.engine.transformers.scheduler import PromptPart, Scheduler
from saeguard_server.engine.transformers.sequence import KvBlocks, PrefixCache, PrefixHit, Sequence
from saeguard_server.errors import DeadlineExceeded, InternalFailure, Overloaded, SaeguardError
from saeguard_server.observe import Metrics

_log = logging.getLogger(__name__)
_RETRY_S = 1.0


class Core:
    """Requests in, events out; lives on one thread.

    Args:
        prefill_tokens: prompt tokens read in one step.
        blocks: of KV memory.
        reuse: whether KV of equal beginnings is shared.
    """

    def __init__(
        self,
        model: LoadedModel,
        network: Network,
        saes: Mapping[str, LoadedSae],
        metrics: Metrics,
        *,
        slots: int,
        prefill_tokens: int,
        blocks: int,
        reuse: bool = True,
    ) -> None:
        self.model, self.saes, self.metrics = model, saes, metrics
        self.prefill_tokens = prefill_tokens
        self.runner = Runner(model, network, saes, slots, blocks)
        memory = KvBlocks(blocks)
        self.prefixes = PrefixCache(memory, self.runner.tables.tally) if reuse else None
        self.scheduler = Scheduler(slots, memory, self.prefixes)
        self.capture = Capture(saes)
        self.answers = OutputProcessor(model, saes, metrics, self.runner.tables)

    def step(self) -> None:
        """One turn for everyone."""
        self._expire()
        self._make_room()
        self._admit()
        self._pass(tuple(self.scheduler.running), self.scheduler.next_parts(self.prefill_tokens))
        self._gauges()

    def cancel(self, uid: int) -> None:
        """Drops a request whose owner is gone; it is told nothing."""
        for sequence in self.scheduler.everyone():
            if sequence.uid == uid:
                self._leave(sequence)
                self._gauges()

    def fail_all(self, error: SaeguardError) -> None:
        """Ends every request with this error."""
        for sequence in self.scheduler.everyone():
            self._fail(sequence, error)
        self._gauges()

    def release(self) -> None:
        """Lets go of the memory for KV, so that another core can take it; this one steps no more."""
        self.runner.network.detach()

    def _expire(self) -> None:
        now = time.monotonic()
        for sequence in self.scheduler.everyone():
            if now >= sequence.task.call.deadline:
                self._fail(sequence, DeadlineExceeded("the deadline passed before the answer was complete"))

    def _make_room(self) -> None:
        room = self.scheduler.make_room()
        for sequence, slot in room.given_up:
            self._given_up(sequence, slot)
        for sequence in room.grown:
            self.runner.seats.place(sequence.slot, sequence.blocks)

    def _admit(self) -> None:
        while admitted := self.scheduler.admit():
            sequence, hit = admitted
            self._guarded(sequence, partial(self._join, sequence, hit))

    def _join(self, sequence: Sequence, hit: PrefixHit) -> None:
        if not sequence.started:
            sequence.started = time.monotonic()
        self.metrics.reused_tokens.inc(sequence.reused)
        self.runner.join(sequence, hit.tallies)

    def _pass(self, running: tuple[Sequence, ...], parts: list[PromptPart]) -> None:
        """One forward pass: the last token of those who generate, and these parts of prompts."""
        everyone = (*running, *(part.sequence for part in parts))
        ending = [part for part in parts if part.is_last and isinstance(part.sequence.task, GenerateTask)]
        scored = [part for part in parts if _is_scored(part)]
        if not everyone:
            return
        try:
            slots = tuple(one.slot for one in running)
            logits = self.runner.forward(slots, parts, ending, scored, self.capture)
        except Exception as err:
            if not is_out_of_memory(err):
                raise
            self._out_of_memory(everyone)
            return
        self._account(everyone, [*(one.computed + 1 for one in running), *(part.end for part in parts)])
        choosing = [*running, *(part.sequence for part in ending)]
        alive = [row for row, one in enumerate(choosing) if not one.is_done]
        picked = self._choose([choosing[row] for row in alive], alive, everyone, logits)
        self._report(parts, scored, logits[len(choosing) :])
        for part in ending:
            if not part.sequence.is_done:
                self.scheduler.start_generating(part.sequence)
        for row, at in enumerate(alive):
            self._guarded(choosing[at], partial(self._take, choosing[at], picked, row, at < len(running)))

    def _account(self, everyone: tuple[Sequence, ...], computed: list[int]) -> None:
        """What the pass did to everyone in it: up to where their tokens are read now, edited wherever that was due."""
        if self.runner.tables.missed():
            for sequence in everyone:
                self._guarded(sequence, partial(self.runner.tables.check, sequence.slot))
        self.metrics.steps.inc()
        self.metrics.batch_size.observe(len(everyone))
        for sequence, end in zip(everyone, computed, strict=True):
            self._guarded(sequence, partial(self._advance, sequence, end))

    def _report(self, parts: list[PromptPart], scored: list[PromptPart], logits: Tensor) -> None:
        """What the parts of prompts showed: readings, their log-probabilities, activations."""
        found = self.capture.results()
        for part in parts:
            mine = logits[: part.end - part.start] if part in scored else logits[:0]
            logits = logits[len(mine) :]
            self._guarded(part.sequence, partial(self._tell, part, mine, found))

    def _tell(self, part: PromptPart, logits: Tensor, found: Found) -> None:
        sequence = part.sequence
        if isinstance(sequence.task, GenerateTask):
            self.answers.prompt(sequence, sequence.task, part, logits)
            return
        for activations in self.answers.activations(sequence, sequence.task, part, found):
            sequence.send(activations)
        if part.is_last:
            self._leave(sequence)
            sequence.send(None)

    def _choose(
        self, choosing: list[Sequence], rows: list[int], everyone: tuple[Sequence, ...], logits: Tensor
    ) -> HostTokens:
        """The next token of those whose tokens are all read; whoever a trigger stops is told so."""
        watched = [one for one in everyone if one.stops and not one.is_done]
        stopped = self.runner.tables.stopped(tuple(one.slot for one in watched)) if watched else None
        slots = tuple(one.slot for one in choosing)
        wanted = logits[: len(rows)] if rows == list(range(len(rows))) else logits[rows]
        picked = HostTokens.fetch(self.runner.pick(wanted, slots) if slots else None, stopped)
        self.runner.seats.choose(slots, [max(token, 0) for token in picked.tokens])
        for sequence, is_stopped in zip(watched, picked.stopped, strict=True):
            if is_stopped:
                self._guarded(sequence, partial(self._stop, sequence))
        return picked

    def _stop(self, sequence: Sequence) -> None:
        chunk = self.answers.stopped(sequence)
        self._leave(sequence)
        sequence.send(chunk)

    def _take(self, sequence: Sequence, picked: HostTokens, row: int, is_read: bool) -> None:
        chunk = self.answers.token(sequence, picked, row, is_read=is_read)
        if chunk is not None:
            if chunk.completion is not None:
                self._leave(sequence)
            sequence.send(chunk)

    def _advance(self, sequence: Sequence, computed: int) -> None:
        if sequence.computed < sequence.prompt_tokens:
            self.metrics.prompt_tokens.inc(min(computed, sequence.prompt_tokens) - sequence.computed)
        sequence.computed = computed
        sequence.forward_passes += 1
        if self.prefixes is not None:
            self.prefixes.learn(sequence)

    def _out_of_memory(self, sequences: tuple[Sequence, ...]) -> None:
        """The youngest of the pass is refused; the others start again from what they have."""
        _log.error("out of memory in a step", extra={"fields": {"requests": len(sequences)}})
        youngest = max(sequences, key=lambda one: one.uid)
        self._fail(youngest, Overloaded("the engine ran out of memory", _RETRY_S))
        for sequence in sequences:
            if isinstance(sequence.task, InspectTask):
                self._fail(sequence, Overloaded("the engine ran out of memory", _RETRY_S))
            elif not sequence.is_done:
                self._given_up(sequence, self.scheduler.preempt(sequence))

    def _given_up(self, sequence: Sequence, slot: int) -> None:
        _log.info("a request gave its memory up", extra={"request_id": sequence.task.call.request_id})
        self.metrics.preemptions.inc()
        self.runner.leave(slot)

    def _guarded(self, sequence: Sequence, work: Callable[[], None]) -> None:
        """Work for one request: what goes wrong in it ends that request and no other."""
        if sequence.is_done:
            return
        try:
            work()
        except SaeguardError as err:
            self._fail(sequence, err)
        except Exception:
            _log.exception("a request failed in the engine", extra={"request_id": sequence.task.call.request_id})
            self._fail(sequence, InternalFailure("the engine failed on this request"))

    def _fail(self, sequence: Sequence, error: SaeguardError) -> None:
        if not sequence.is_done:
            self._leave(sequence)
            sequence.send(error)

    def _leave(self, sequence: Sequence) -> None:
        """Takes a request out and frees its slot and memory."""
        sequence.is_done = True
        slot = sequence.slot
        self.scheduler.remove(sequence)
        if slot >= 0:
            self.runner.leave(slot)

    def _gauges(self) -> None:
        self.metrics.queue_length.set(len(self.scheduler.waiting))
        self.metrics.running_requests.set(self.scheduler.slots_in_use)
        self.metrics.slots_in_use.set(self.scheduler.slots_in_use)
        self.metrics.kv_blocks_in_use.set(self.scheduler.blocks.held)


def _is_scored(part: PromptPart) -> bool:
    task = part.sequence.task
    return isinstance(task, GenerateTask) and task.sampling.prompt_logprobs and part.end > part.sequence.reported
