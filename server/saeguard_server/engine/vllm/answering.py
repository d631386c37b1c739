"""vLLM's outputs as our chunks: text, tokens, the end, with the receipt; one object per request."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saeguard_sae.edit_table import EditCounts
from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.model_files import ModelFiles
from saeguard_server.engine.protocol import GenerateTask, InspectTask
from saeguard_server.engine.receipts import receipt
from saeguard_server.engine.text import Assembler
from saeguard_server.engine.vllm.orders import Activations, Report
from saeguard_server.errors import InternalFailure, NonFiniteOutput, Unavailable
from saeguard_server.observe.metrics import Metrics
from saeguard_server.reply import (
    ActivationPart,
    Chunk,
    Completion,
    FeatureReading,
    FinishReason,
    Receipt,
    Timings,
    Token,
    TokenLogprob,
    TokenText,
)

_NOT_FINITE = "the model's output is not finite for this request; an edit may be too large"


class Answer:
    """What one generation gets, as its outputs come."""

    def __init__(self, task: GenerateTask, text: Assembler, model: ModelFiles, metrics: Metrics) -> None:
        self._task, self._text, self._model, self._metrics = task, text, model, metrics
        self._submitted, self._last = task.call.arrived, time.monotonic()
        self._first = 0.0
        self._queued = self._last - self._submitted
        self.generated: list[int] = []
        self.finish_reason: FinishReason | None = None
        """Why it ended; None while it goes on."""

    @property
    def tokens_read(self) -> int:
        """Tokens that the model read for it: the last one is sampled and never read."""
        return len(self._task.tokens) + len(self.generated) - 1

    def chunk(self, output: Any) -> Chunk:
        """An output's tokens and text; sets ``finish_reason`` at the end.

        Raises:
            NonFiniteOutput: the logits were not finite.
            Unavailable, InternalFailure: vLLM gave the request up.
        """
        made = output.outputs[0]
        scored = self._prompt_logprobs(output)
        self._time(output, len(made.token_ids))
        text, tokens = "", []
        for at, token in enumerate(made.token_ids):
            tokens.append(self._token(token, made.logprobs[at] if made.logprobs else None))
            self.generated.append(token)
            ends = token in self._model.eos_ids and not self._task.sampling.ignore_eos
            text += "" if ends else self._text.push(token)
            if self._text.stopped_by:
                self.finish_reason = "stop"
                break
        if self.finish_reason is None:
            self.finish_reason = _reason(made.finish_reason)
        return Chunk(text, tuple(tokens), prompt_logprobs=scored)

    def last(self, chunk: Chunk, report: Report | None, saes: Mapping[str, LoadedSae]) -> Chunk:
        """The last chunk, with the completion.

        Args:
            report: what the workers did, for a request that had an order.

        Raises:
            InternalFailure: an edit was not offered every token in its scope exactly once.
        """
        assert self.finish_reason is not None, "it has ended"
        task = self._task
        readings = _readings(report, len(task.watch)) if report and task.watch else ()
        completion = Completion(
            finish_reason=self.finish_reason,
            stop_string=self._text.stopped_by,
            prompt_tokens=len(task.tokens),
            generated_tokens=len(self.generated),
            timings=Timings(self._queued, self._first - self._submitted, time.monotonic() - self._submitted),
            receipt=self._receipt(report, saes) if report else None,
            seed=task.seed,
        )
        return Chunk(chunk.text + self._text.flush(), chunk.tokens, readings, chunk.prompt_logprobs, completion)

    def _receipt(self, report: Report, saes: Mapping[str, LoadedSae]) -> Receipt | None:
        made = receipt(
            self._task.steering,
            counts_of(report),
            read=(*self._task.tokens, *self.generated[:-1]),
            forward_passes=report.forward_passes,
            saes=saes,
            special_ids=self._model.tokenizer.special_ids,
            model_digest=self._model.info.digest,
        )
        for one in made.interventions if made else ():
            if not one.is_shadow:
                self._metrics.tokens_edited.labels(one.sae, one.kind).inc(one.tokens_edited)
                self._metrics.relative_edit.labels(one.sae).observe(one.mean_relative_edit)
        return made

    def _token(self, token: int, found: Mapping[int, Any] | None) -> Token:
        asked = self._task.sampling.logprobs
        if found is None:
            return Token(token)
        own = found[token].logprob
        if own != own:
            raise NonFiniteOutput(_NOT_FINITE)
        if asked is None:
            return Token(token)
        best = sorted((one.rank, index, one.logprob) for index, one in found.items() if one.rank <= asked)
        return Token(token, own, tuple(TokenLogprob(index, value) for _, index, value in best[:asked]))

    def _prompt_logprobs(self, output: Any) -> tuple[float, ...]:
        """Of the prompt's tokens after the first, with the first output."""
        if self.generated or not self._task.sampling.prompt_logprobs:
            return ()
        pairs = zip(self._task.tokens[1:], output.prompt_logprobs[1:], strict=True)
        found = tuple(one[token].logprob for token, one in pairs)
        if any(one != one for one in found):
            raise NonFiniteOutput(_NOT_FINITE)
        return found

    def _time(self, output: Any, tokens: int) -> None:
        now = time.monotonic()
        self._metrics.generated_tokens.inc(tokens)
        if not self._first:
            self._first = now
            stats = output.metrics
            if stats is not None:
                self._queued += max(0.0, stats.scheduled_ts - stats.queued_ts)
            reused = output.num_cached_tokens or 0
            self._metrics.reused_tokens.inc(reused)
            self._metrics.prompt_tokens.inc(len(self._task.tokens) - reused)
            self._metrics.time_to_first_token.observe(now - self._submitted)
        else:
            self._metrics.time_per_output_token.observe((now - self._last) / max(tokens, 1))
        self._last = now


def counts_of(report: Report) -> list[EditCounts]:
    """What each edit did, in the order of the request."""
    return [
        EditCounts(
            one.eligible, one.edited, one.capped, one.mean_activation, one.max_activation, one.mean_relative_edit
        )
        for one in report.counts
    ]


def merge(reports: Iterable[Report]) -> Report:
    """The reports of all workers as one: each has the edits at its layers, and shards of a layer have the same.

    Raises:
        InternalFailure: a worker has a problem.
    """
    every = list(reports)
    for one in every:
        if one.problem:
            raise InternalFailure(one.problem)
    counts = {count.edit: count for one in every for count in one.counts}
    readings = {(part.start, part.columns): part for one in every for part in one.readings}
    found = {(part.start, part.sae): part for one in every for part in one.activations}
    return Report(
        tuple(counts[at] for at in sorted(counts)),
        tuple(readings[at] for at in sorted(readings)),
        tuple(found.values()),
        max(one.forward_passes for one in every),
    )


def activations(task: InspectTask, report: Report, saes: Sequence[str], model: ModelFiles) -> list[ActivationPart]:
    """The parts of an inspection, in order of position and then as asked.

    Raises:
        NonFiniteOutput: an edit made them so.
    """
    order = {pick.sae: at for at, pick in enumerate(task.picks)}
    found = sorted(report.activations, key=lambda one: (one.start, order[saes[one.sae]]))
    return [_part(task, one, saes[one.sae], model) for one in found]


def _part(task: InspectTask, found: Activations, sae: str, model: ModelFiles) -> ActivationPart:
    indptr, indices, values = array("I", found.indptr), array("I", found.indices), array("f", found.values)
    if any(value != value for value in values):
        raise NonFiniteOutput("activations are not finite; an edit may be too large")
    where = range(found.start, found.start + len(indptr) - 1)
    tokens = tuple(TokenText(task.tokens[i], model.tokenizer.text(task.tokens[i]), task.offsets[i]) for i in where)
    return ActivationPart(task.index, sae, found.start, tokens, indptr, indices, values, where.stop == len(task.tokens))


def _readings(report: Report, columns: int) -> tuple[FeatureReading, ...]:
    """The watched features by position; parts of different pipeline stages stand side by side."""
    rows: dict[int, list[float]] = {}
    for part in report.readings:
        values, width = array("f", part.values), len(part.columns)
        for at in range(len(values) // width):
            row = rows.setdefault(part.start + at, [0.0] * columns)
            for column, value in zip(part.columns, values[at * width : (at + 1) * width], strict=True):
                row[column] = value
    return tuple(FeatureReading(position, tuple(row)) for position, row in sorted(rows.items()))


def _reason(reason: str | None) -> FinishReason | None:
    match reason:
        case None | "stop" | "length":
            return reason
        case "abort":
            raise Unavailable("vLLM gave this request up", 1.0)
        case _:
            raise InternalFailure(f"vLLM ended this request with {reason!r}")
