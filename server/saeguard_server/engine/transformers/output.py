"""What a request is told: its tokens and text, readings, activations, and how it ended, with the receipt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saeguard.results import (
    ActivationPart,
    Completion,
    FeatureReading,
    FinishReason,
    Receipt,
    StreamChunk,
    Token,
    TokenLogprob,
    TokenText,
    Usage,
)
from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.load import LoadedModel
from saeguard_server.engine.protocol import GenerateTask, InspectTask
from saeguard_server.engine.tables import SteeringTables, build_receipt, stopped_by
from saeguard_server.engine.transformers.runner import Found, SparseValues
from saeguard_server.engine.transformers.sampler import SampledTokens
from saeguard_server.engine.transformers.scheduler import PromptPart
from saeguard_server.engine.transformers.sequence import Sequence
from saeguard_server.errors import NonFiniteOutput
from saeguard_server.observe import Metrics

# From a step's tensors to what a request is told: tokens with log-probabilities, and readings.


@dataclass(frozen=True, slots=True)
class HostTokens:
    """One step's choices on the host, and which of the requests that a trigger can stop it did."""

    stopped: list[int]
    tokens: list[int]
    logprobs: list[float] | None
    top_values: list[list[float]] | None
    top_ids: list[list[int]] | None

    @classmethod
    def fetch(cls, picked: SampledTokens | None, stopped: Tensor | None) -> HostTokens:
        """The step's one wait for the device, and one more for each thing that somebody asked for.

        Args:
            stopped: bool [n].
        """
        flags = [] if stopped is None else [stopped.long()]
        if picked is None:
            return cls(torch.cat(flags).tolist() if flags else [], [], None, None, None)
        whole = torch.cat([picked.token, *flags]).tolist() if flags else picked.token.tolist()
        tokens, top = len(picked.token), picked.top
        return cls(
            whole[tokens:],
            whole[:tokens],
            None if picked.logprob is None else picked.logprob.tolist(),
            None if top is None else top[0].tolist(),
            None if top is None else top[1].tolist(),
        )

    def token(self, row: int, asked: int | None) -> Token:
        """The row's token with as many log-probabilities as its request asked for.

        Raises:
            NonFiniteOutput: its logits were not finite.
        """
        if self.tokens[row] < 0:
            raise NonFiniteOutput("the model's output is not finite for this request; an edit may be too large")
        if asked is None or self.logprobs is None:
            return Token(self.tokens[row])
        top: tuple[TokenLogprob, ...] = ()
        if asked and self.top_ids is not None and self.top_values is not None:
            pairs = zip(self.top_ids[row][:asked], self.top_values[row][:asked], strict=True)
            top = tuple(TokenLogprob(index, value) for index, value in pairs)
        return Token(self.tokens[row], self.logprobs[row], top)


def prompt_logprobs(logits: Tensor, following: list[int]) -> tuple[float, ...]:
    """logits [T, vocabulary] and the up to T tokens that followed -> their log-probabilities.

    Raises:
        NonFiniteOutput: the logits were not finite.
    """
    rows = logits[: len(following)].log_softmax(dim=-1)
    found = rows.gather(1, torch.tensor(following, device=logits.device)[:, None]).squeeze(1)
    if found.isnan().any():
        raise NonFiniteOutput("the model's output is not finite for this request; an edit may be too large")
    return tuple(found.tolist())


def feature_readings(values: Tensor, start: int) -> tuple[FeatureReading, ...]:
    """values [T, watched] of the tokens from position ``start`` on."""
    return tuple(FeatureReading(start + row, tuple(one)) for row, one in enumerate(values.tolist()))


class OutputProcessor:
    """Makes the events of every request; the receipt is checked here before anybody sees it."""

    def __init__(
        self, model: LoadedModel, saes: Mapping[str, LoadedSae], metrics: Metrics, tables: SteeringTables
    ) -> None:
        self._model, self._saes, self._metrics, self._tables = model, saes, metrics, tables

    def prompt(self, sequence: Sequence, task: GenerateTask, part: PromptPart, logits: Tensor) -> None:
        """Tells what a part of its prompt showed, where it asked; logits [T or 0, vocabulary].

        Raises:
            NonFiniteOutput: its log-probabilities are not numbers.
        """
        if task.measure is not None and len(logits):
            measure, side = task.measure
            measure.offer(side, part.start, logits)
        new = max(part.start, sequence.reported)
        following = sequence.tokens[new + 1 : min(part.end + 1, sequence.prompt_tokens)] if len(logits) else []
        scored = prompt_logprobs(logits[new - part.start :], following) if following else ()
        read = self._readings(sequence, task, part.start)[new - part.start :]
        sequence.reported = max(sequence.reported, part.end)
        if read or scored:
            sequence.send(StreamChunk(readings=read, prompt_logprobs=scored))

    def token(self, sequence: Sequence, picked: HostTokens, row: int, *, is_read: bool) -> StreamChunk | None:
        """What a chosen token lets a request be told; has a completion when that is the last.

        A token that a trigger could stop is kept back until the next pass has read it.

        Args:
            is_read: the pass read the token before it alone, whose readings are still to be told.

        Raises:
            NonFiniteOutput: the logits were not finite.
            InternalFailure: an edit or guard was not offered every token in its scope exactly once.
        """
        task = sequence.task
        assert isinstance(task, GenerateTask), "only generations sample"
        read: tuple[FeatureReading, ...] = ()
        if is_read:
            read = self._readings(sequence, task, sequence.computed - 1)
            sequence.reported = sequence.computed
        before = None
        if sequence.held is not None:
            before, sequence.held = self._tell(sequence, task, sequence.held, read), None
            if before.completion is not None:
                return before
            read = ()
        token = picked.token(row, task.sampling.logprobs)
        is_special = token.id in self._model.tokenizer.special_ids
        if sequence.must_be_read(len(sequence.tokens), is_special=is_special):
            sequence.held = token
        sequence.tokens.append(token.id)
        if sequence.held is not None:
            return before or (StreamChunk(readings=read) if read else None)
        now = self._tell(sequence, task, token, read)
        return now if before is None else _joined(before, now)

    def stopped(self, sequence: Sequence) -> StreamChunk:
        """The last chunk of a request that a trigger ended: what is safe of the text, and which trigger."""
        task, text = sequence.task, sequence.text
        assert isinstance(task, GenerateTask), "only generations can be stopped"
        assert text is not None, "a generation has text"
        trigger = stopped_by(task.steering, self._tables.seen(sequence.slot))
        sent = sequence.generated_tokens - (sequence.held is not None)
        completion = self._complete(sequence, task, "feature", "")
        completion = replace(completion, usage=replace(completion.usage, generated_tokens=sent), stopped_by=trigger)
        return StreamChunk(text.flush(), completion=completion)

    def activations(
        self, sequence: Sequence, task: InspectTask, part: PromptPart, found: Found
    ) -> list[ActivationPart]:
        """A part of every SAE's activations, in the order asked for.

        Raises:
            NonFiniteOutput: an edit made them so.
            InternalFailure: an edit was not offered every token in its scope exactly once.
        """
        parts = [self._activations(task, pick.sae, found[sequence.uid, pick.sae], part) for pick in task.picks]
        if part.is_last:
            self._receipt(sequence)
        return parts

    def _tell(
        self, sequence: Sequence, task: GenerateTask, token: Token, read: tuple[FeatureReading, ...]
    ) -> StreamChunk:
        """The chunk of the sequence's last token."""
        text = sequence.text
        assert text is not None, "a generation has text"
        self._time(sequence)
        ends = token.id in self._model.eos_ids and not task.sampling.ignore_eos
        piece = "" if ends else text.push(token.id)
        reason = self._finish_reason(sequence, task, ends=ends or bool(text.stopped_by))
        if reason is None:
            return StreamChunk(piece, (token,), read)
        completion = self._complete(sequence, task, reason, text.stopped_by)
        return StreamChunk(piece + text.flush(), (token,), read, completion=completion)

    def _activations(
        self, task: InspectTask, sae: str, found: SparseValues | Exception, part: PromptPart
    ) -> ActivationPart:
        if isinstance(found, Exception):
            raise found
        if any(value != value for value in found.values):
            raise NonFiniteOutput("activations are not finite; an edit may be too large")
        where = range(part.start, part.end)
        text = self._model.tokenizer.text
        tokens = tuple(TokenText(task.tokens[i], text(task.tokens[i]), task.offsets[i]) for i in where)
        return ActivationPart(
            task.index, sae, tokens, found.indptr, found.indices, found.values, part.start, part.is_last
        )

    def _readings(self, sequence: Sequence, task: GenerateTask, start: int) -> tuple[FeatureReading, ...]:
        if not task.watch:
            return ()
        return feature_readings(self._tables.readings(task.steering, task.watch, sequence.slot), start)

    def _finish_reason(self, sequence: Sequence, task: GenerateTask, *, ends: bool) -> FinishReason | None:
        if ends:
            return "stop"
        is_full = len(sequence.tokens) >= self._model.info.max_context
        return "length" if is_full or sequence.generated_tokens >= task.max_new_tokens else None

    def _complete(self, sequence: Sequence, task: GenerateTask, reason: FinishReason, stop: str) -> Completion:
        return Completion(
            finish_reason=reason,
            stop_string=stop,
            timings=sequence.timings(),
            receipt=self._receipt(sequence),
            seed=task.seed,
            usage=Usage(sequence.prompt_tokens, sequence.generated_tokens),
        )

    def _receipt(self, sequence: Sequence) -> Receipt | None:
        steering = sequence.task.steering
        made = build_receipt(
            steering,
            self._tables.counts(sequence.slot, steering),
            read=sequence.tokens[: sequence.computed],
            forward_passes=sequence.forward_passes,
            saes=self._saes,
            special_ids=self._model.tokenizer.special_ids,
            model_digest=self._model.info.digest,
            seen=self._tables.seen(sequence.slot),
        )
        for one in made.interventions if made else ():
            if not one.is_shadow:
                self._metrics.tokens_edited.labels(one.sae, one.kind).inc(one.tokens_edited)
                self._metrics.relative_edit.labels(one.sae).observe(one.mean_relative_edit)
        return made

    def _time(self, sequence: Sequence) -> None:
        now = time.monotonic()
        self._metrics.generated_tokens.inc()
        if sequence.generated_tokens == 1:
            sequence.first_token = now
            self._metrics.time_to_first_token.observe(now - sequence.submitted)
        else:
            self._metrics.time_per_output_token.observe(now - sequence.last_token)
        sequence.last_token = now


def _joined(first: StreamChunk, second: StreamChunk) -> StreamChunk:
    """What two tokens of one step let a request be told."""
    return replace(
        second,
        text=first.text + second.text,
        tokens=first.tokens + second.tokens,
        readings=first.readings + second.readings,
    )
