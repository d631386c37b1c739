"""The engine's step: read prompts within a budget, decode every running request once, tell everyone what happened."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from torch import Tensor

from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.protocol import GenerateTask, InspectTask
from saeguard_server.engine.transformers import outcome
from saeguard_server.engine.transformers.capture import Capture, Sparse
from saeguard_server.engine.transformers.model import LoadedModel
from saeguard_server.engine.transformers.outcome import HostPicked
from saeguard_server.engine.transformers.runner import Runner
from saeguard_server.engine.transformers.scheduler import PromptPart, Scheduler
from saeguard_server.engine.transformers.sequence import Sequence
from saeguard_server.errors import DeadlineExceeded, InternalFailure, NonFiniteOutput, SaeguardError
from saeguard_server.observe.metrics import Metrics
from saeguard_server.reply import ActivationPart, Chunk, Completion, FeatureReading, FinishReason, Receipt, TokenText

_log = logging.getLogger(__name__)


class Core:
    """Requests in, events out; lives on one thread.

    Args:
        prefill_tokens: prompt tokens read between two decode steps.
    """

    def __init__(
        self,
        model: LoadedModel,
        saes: dict[str, LoadedSae],
        metrics: Metrics,
        *,
        slots: int,
        prefill_tokens: int,
    ) -> None:
        self.model, self.saes, self.metrics = model, saes, metrics
        self.context, self.prefill_tokens = model.info.max_context, prefill_tokens
        self.scheduler = Scheduler(slots)
        self.runner = Runner(model, saes, slots, self.context)

    def step(self) -> None:
        """One turn for everyone."""
        self._expire()
        self._read_prompts()
        self._decode()
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

    def close(self) -> None:
        """Takes the hooks out of the model."""
        self.runner.hooks.close()

    def _expire(self) -> None:
        now = time.monotonic()
        for sequence in self.scheduler.everyone():
            if now >= sequence.task.call.deadline:
                self._fail(sequence, DeadlineExceeded("the deadline passed before the answer was complete"))

    def _read_prompts(self) -> None:
        budget = self.prefill_tokens
        while True:
            if admitted := self.scheduler.admit():
                self._guarded(admitted, partial(self._join, admitted))
            part = self.scheduler.next_part(budget)
            if part is None:
                return
            budget -= part.end - part.start
            self._guarded(part.sequence, partial(self._read, part))

    def _join(self, sequence: Sequence) -> None:
        sequence.started = time.monotonic()
        self.runner.join(sequence.slot, sequence.task)

    def _read(self, part: PromptPart) -> None:
        sequence = part.sequence
        if isinstance(sequence.task, InspectTask):
            self._inspect(sequence, sequence.task, part)
        else:
            self._prefill(sequence, sequence.task, part)

    def _inspect(self, sequence: Sequence, task: InspectTask, part: PromptPart) -> None:
        capture = sequence.capture = sequence.capture or Capture(task.picks, self.saes)
        self.runner.read(sequence.slot, sequence.tokens[part.start : part.end], part.start, watch=capture)
        self._advance(sequence, part.end)
        if part.is_last:
            self._receipt(sequence)
        for pick in task.picks:
            sequence.send(self._activations(task, pick.sae, capture.found[pick.sae], part))
        if part.is_last:
            self._leave(sequence)
            sequence.send(None)

    def _prefill(self, sequence: Sequence, task: GenerateTask, part: PromptPart) -> None:
        tokens = sequence.tokens[part.start : part.end]
        every = task.sampling.prompt_logprobs
        logits = self.runner.read(sequence.slot, tokens, part.start, every_logit=every)
        self._advance(sequence, part.end)
        following = sequence.tokens[part.start + 1 : part.end + 1] if every else []
        scored = outcome.prompt_logprobs(logits, following) if following else ()
        chunk = Chunk(readings=self._readings(sequence, task, 0, part.start), prompt_logprobs=scored)
        if chunk.readings or scored:
            sequence.send(chunk)
        if part.is_last:
            self.scheduler.start_generating()
            self._choose([sequence], logits[-1:], slice(sequence.slot, sequence.slot + 1), is_read=False)

    def _decode(self) -> None:
        running = list(self.scheduler.running)
        if not running:
            return
        longest = max(sequence.computed for sequence in running) + 1
        logits = self.runner.decode(len(running), longest)
        self.metrics.steps.inc()
        self.metrics.batch_size.observe(len(running))
        for sequence in running:
            self._advance(sequence, sequence.computed + 1)
        self._choose(running, logits, slice(0, len(running)), is_read=True)

    def _choose(self, sequences: list[Sequence], logits: Tensor, slots: slice, *, is_read: bool) -> None:
        """The next token of consecutive slots; ``is_read``: with the readings of the one before."""
        picked = HostPicked.fetch(self.runner.pick(logits, slots))
        for row, sequence in enumerate(sequences):
            self._guarded(sequence, partial(self._take, sequence, picked, row, is_read))

    def _take(self, sequence: Sequence, picked: HostPicked, row: int, is_read: bool) -> None:
        task, text = sequence.task, sequence.text
        assert isinstance(task, GenerateTask), "only generations sample"
        assert text is not None, "a generation has text"
        token = picked.token(row, task.sampling.logprobs)
        read = self._readings(sequence, task, row, sequence.computed - 1) if is_read else ()
        sequence.tokens.append(token.id)
        self._time(sequence)
        ends = token.id in self.model.eos_ids and not task.sampling.ignore_eos
        piece = "" if ends else text.push(token.id)
        reason = self._finish_reason(sequence, task, ends=ends or bool(text.stopped_by))
        if reason is None:
            sequence.send(Chunk(piece, (token,), read))
            return
        completion = self._complete(sequence, task, reason, text.stopped_by)
        sequence.send(Chunk(piece + text.flush(), (token,), read, completion=completion))

    def _finish_reason(self, sequence: Sequence, task: GenerateTask, *, ends: bool) -> FinishReason | None:
        if ends:
            return "stop"
        is_full = sequence.generated_tokens >= task.max_new_tokens or len(sequence.tokens) >= self.context
        return "length" if is_full else None

    def _complete(self, sequence: Sequence, task: GenerateTask, reason: FinishReason, stop: str) -> Completion:
        receipt = self._receipt(sequence)
        self._leave(sequence)
        return Completion(
            finish_reason=reason,
            stop_string=stop,
            prompt_tokens=sequence.prompt_tokens,
            generated_tokens=sequence.generated_tokens,
            timings=sequence.timings(),
            receipt=receipt,
            seed=task.seed,
        )

    def _receipt(self, sequence: Sequence) -> Receipt | None:
        counts = self.runner.hooks.counts(sequence.slot, sequence.task.steering)
        special = self.model.tokenizer.special_ids
        receipt = outcome.receipt(sequence, counts, self.saes, special, self.model.info.digest)
        for one in receipt.interventions if receipt else ():
            self.metrics.tokens_edited.labels(one.sae, one.kind).inc(one.tokens_edited)
            self.metrics.relative_edit.labels(one.sae).observe(one.mean_relative_edit)
        return receipt

    def _readings(self, sequence: Sequence, task: GenerateTask, row: int, start: int) -> tuple[FeatureReading, ...]:
        if not task.watch:
            return ()
        return outcome.readings(self.runner.hooks.readings(task.steering, task.watch, sequence.slot, row), start)

    def _activations(self, task: InspectTask, sae: str, found: Sparse, part: PromptPart) -> ActivationPart:
        if any(value != value for value in found.values):
            raise NonFiniteOutput("activations are not finite; an edit may be too large")
        where = range(part.start, part.end)
        text = self.model.tokenizer.text
        tokens = tuple(TokenText(task.tokens[i], text(task.tokens[i]), task.offsets[i]) for i in where)
        return ActivationPart(
            task.index, sae, part.start, tokens, found.indptr, found.indices, found.values, part.is_last
        )

    def _advance(self, sequence: Sequence, computed: int) -> None:
        if sequence.computed < sequence.prompt_tokens:
            self.metrics.prompt_tokens.inc(computed - sequence.computed)
        sequence.computed = computed
        sequence.forward_passes += 1

    def _time(self, sequence: Sequence) -> None:
        now = time.monotonic()
        self.metrics.generated_tokens.inc()
        if sequence.generated_tokens == 1:
            sequence.first_token = now
            self.metrics.time_to_first_token.observe(now - sequence.submitted)
        else:
            self.metrics.time_per_output_token.observe(now - sequence.last_token)
        sequence.last_token = now

    def _guarded(self, sequence: Sequence, work: Callable[[], None]) -> None:
        """Work for one request: what goes wrong in it ends that request and no other."""
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
        """Takes a request out and frees its slot; the last ones move up."""
        sequence.is_done = True
        slot = sequence.slot
        moves = self.scheduler.remove(sequence)
        if slot >= 0:
            self.runner.leave(slot, len(sequence.tokens))
        for move in moves:
            self.runner.move(move.source, move.target, move.sequence.computed)

    def _gauges(self) -> None:
        self.metrics.queue_length.set(len(self.scheduler.waiting))
        self.metrics.running_requests.set(self.scheduler.slots_in_use)
        self.metrics.slots_in_use.set(self.scheduler.slots_in_use)
