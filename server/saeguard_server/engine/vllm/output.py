"""vLLM's outputs as our chunks: text, tokens, the end, with the receipt; one object per request."""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saeguard.results import (
    ActivationPart,
    Completion,
    FeatureReading,
    FinishReason,
    Receipt,
    StreamChunk,
    Timings,
    Token,
    TokenLogprob,
    TokenText,
    Usage,
)
from saeguard_sae.edit_table import EditCounts
from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.load import ModelFiles
from saeguard_server.engine.protocol import GenerateTask, InspectTask, Steering
from saeguard_server.engine.tables import build_receipt
from saeguard_server.engine.tokenizer import Assembler
from saeguard_server.engine.vllm.orders import KEY, Activations, WorkerOutput, may_reuse
from saeguard_server.errors import InternalFailure, InvalidRequest, NonFiniteOutput, Unavailable
from saeguard_server.observe import Metrics

_NOT_FINITE = "the model's output is not finite for this request; an edit may be too large"


class RequestAnswer:
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

    def chunk(self, output: Any) -> StreamChunk:
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
        return StreamChunk(text, tuple(tokens), prompt_logprobs=scored)

    def last(self, chunk: StreamChunk, report: WorkerOutput | None, saes: Mapping[str, LoadedSae]) -> StreamChunk:
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
            timings=Timings(self._queued, self._first - self._submitted, time.monotonic() - self._submitted),
            receipt=self._receipt(report, saes) if report else None,
            seed=task.seed,
            usage=Usage(len(task.tokens), len(self.generated)),
        )
        return StreamChunk(chunk.text + self._text.flush(), chunk.tokens, readings, chunk.prompt_logprobs, completion)

    def _receipt(self, report: WorkerOutput, saes: Mapping[str, LoadedSae]) -> Receipt | None:
        made = build_receipt(
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


def counts_of(report: WorkerOutput) -> list[EditCounts]:
    """What each edit did, in the order of the request."""
    return [
        EditCounts(
            one.eligible, one.edited, one.capped, one.mean_activation, one.max_activation, one.mean_relative_edit
        )
        for one in report.counts
    ]


def merge_outputs(reports: Iterable[WorkerOutput]) -> WorkerOutput:
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
    return WorkerOutput(
        tuple(counts[at] for at in sorted(counts)),
        tuple(readings[at] for at in sorted(readings)),
        tuple(found.values()),
        max(one.forward_passes for one in every),
    )


def activation_parts(
    task: InspectTask, report: WorkerOutput, saes: Sequence[str], model: ModelFiles
) -> list[ActivationPart]:
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
    return ActivationPart(task.index, sae, tokens, indptr, indices, values, found.start, where.stop == len(task.tokens))


def _readings(report: WorkerOutput, columns: int) -> tuple[FeatureReading, ...]:
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


# A task in vLLM's terms: the arguments of its sampling parameters and its prompt.


COLDEST, HOTTEST = 0.01, 2.0
"""vLLM refuses what is hotter, and takes what is colder as this."""


def sampling_arguments(task: GenerateTask, order: bytes | None, eos_ids: frozenset[int]) -> dict[str, Any]:
    """Arguments for ``SamplingParams``.

    Raises:
        InvalidRequest: a temperature that vLLM does not know.
    """
    asked = task.sampling
    if asked.temperature and not COLDEST <= asked.temperature <= HOTTEST:
        limits = f"must be 0 (greedy) or {COLDEST:g} to {HOTTEST:g} with the vllm engine"
        raise InvalidRequest("sampling.temperature", f"{limits}, got {asked.temperature:g}")
    # A steered request's token has a log-probability whoever asked: it tells whether the logits were finite.
    watched = 0 if order is not None and asked.logprobs is None else asked.logprobs
    return _common(task, order) | {
        "max_tokens": task.max_new_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty,
        "seed": task.seed,
        "ignore_eos": asked.ignore_eos,
        "stop_token_ids": [] if asked.ignore_eos else sorted(eos_ids),
        "logprobs": watched,
        "prompt_logprobs": 0 if asked.prompt_logprobs else None,
    }


def inspection_arguments(task: InspectTask, order: bytes | None) -> dict[str, Any]:
    """Arguments for ``SamplingParams`` of a request that only has its prompt read: vLLM must sample one token."""
    return _common(task, order) | {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True}


def prompt_arguments(task: GenerateTask | InspectTask) -> dict[str, Any]:
    """vLLM's prompt: KV is shared among those who are steered alike only."""
    given: dict[str, Any] = {"prompt_token_ids": list(task.tokens)}
    return given | {"cache_salt": _salt(task.steering)} if task.steering.digest else given


def _salt(steering: Steering) -> str:
    """Of its positions too, which the digest leaves out: "generated" begins elsewhere after another prompt."""
    return hashlib.blake2b(repr(steering).encode(), digest_size=16).hexdigest()


def _common(task: GenerateTask | InspectTask, order: bytes | None) -> dict[str, Any]:
    ordered = {} if order is None else {"extra_args": {KEY: order}}
    return {
        "detokenize": False,
        # What is not read again is neither counted nor watched.
        "skip_reading_prefix_cache": not may_reuse(task),
        **ordered,
    }
