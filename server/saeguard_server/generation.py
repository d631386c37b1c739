"""Generate: from a checked request to chunks of text, steered as asked or refused before any work."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import zip_longest

from saeguard.requests import ChatInput, GenerateRequest, ModelInput, Sampling
from saeguard.results import Comparison, PolicyFacts, StreamChunk, join_chunks
from saeguard_server.admission import Admission
from saeguard_server.audit.log import Audit, RequestAudit
from saeguard_server.caller import Call
from saeguard_server.catalog import check_watchable, find_feature
from saeguard_server.engine.protocol import Divergence, Engine, GenerateTask, Side, Steering
from saeguard_server.engine.tokenizer import EncodedText, Tokenizer
from saeguard_server.errors import InternalFailure, InvalidRequest, NotConfigured, SaeguardError, UnknownName
from saeguard_server.observe import Metrics, PolicyMetrics
from saeguard_server.policy import resolve
from saeguard_server.policy.compile import Policies, Snapshot
from saeguard_server.settings import LimitSettings
from saeguard_server.steering import (
    PreparedEdit,
    PreparedTrigger,
    TokenRange,
    may_stop,
    own_edits,
    own_triggers,
    prepare_edit,
    prepare_trigger,
    prepared_parts,
    steer,
)

# Prompts to token ids, refused by field.


def encode_prompt(tokenizer: Tokenizer, prompt: ModelInput, prefix: str = "") -> EncodedText:
    """The prompt's tokens. ``prefix`` is the field that holds the prompt, with its dot.

    Raises:
        InvalidRequest: no tokens, an id outside the vocabulary, no chat template.
    """
    try:
        return tokenizer.encode(prompt)
    except ValueError as err:
        field, _, what = str(err).partition(": ")
        raise InvalidRequest(f"{prefix}{field}", what) from err


def check_length(prompt: ModelInput, tokens: int, most: int, prefix: str = "") -> None:
    """Refuses a prompt that does not fit the context.

    Raises:
        InvalidRequest: more than ``most`` tokens.
    """
    if tokens > most:
        name = "text" if isinstance(prompt, str) else "chat" if isinstance(prompt, ChatInput) else "tokens"
        raise InvalidRequest(f"{prefix}{name}", f"has {tokens} tokens, at most {most} fit")


# How far an answer's tokens are from what the model would have said under another steering.


MAX_NEW_TOKENS = 512
"""What waits for the other side is a row of the vocabulary for each token."""


async def measure_divergence(
    engine: Engine, task: GenerateTask, answer: Sequence[int], other: Steering
) -> tuple[float, ...]:
    """KL(task's steering || other) in nats of the next-token distributions, for each token of the task's answer.

    Both read the same tokens, in the same batch.

    Raises:
        SaeguardError: as for a generation.
    """
    if not answer:
        return ()
    measure = Divergence(len(task.tokens) - 1, len(answer))

    def reading(side: Side, steering: Steering) -> GenerateTask:
        return replace(
            task,
            tokens=(*task.tokens, *answer[:-1]),  # the last is not read to be drawn
            sampling=Sampling(temperature=0.0, prompt_logprobs=True),
            max_new_tokens=1,
            # The answer is there: it is read to its end.
            steering=replace(steering, guards=tuple(replace(guard, stops=False) for guard in steering.guards)),
            watch=(),
            measure=(measure, side),
        )

    await asyncio.gather(whole(engine, reading("steered", task.steering)), whole(engine, reading("unsteered", other)))
    return measure.result()


async def whole(engine: Engine, task: GenerateTask) -> tuple[StreamChunk, ...]:
    """Every chunk of a task.

    Raises:
        SaeguardError: as for a generation.
    """
    async with aclosing(engine.generate(task)) as chunks:
        found = [chunk async for chunk in chunks]
    if not found or found[-1].completion is None:
        raise InternalFailure("a generation ended without its completion")
    return tuple(found)


def token_ids(chunks: Sequence[StreamChunk]) -> tuple[int, ...]:
    """The tokens of an answer."""
    return tuple(token.id for chunk in chunks for token in chunk.tokens)


# What policies change, measured on a share of the requests they edit: the same answer, read without the policy.


_log = logging.getLogger(__name__)

MAX_WAITING = 16
"""Measurements that wait; of further ones the server says nothing: traffic comes first."""
DEADLINE_S = 60.0
IDLE_S = 0.2
"""How often it is looked whether the engine has time."""


@dataclass(frozen=True, slots=True)
class _Job:
    policy: str
    task: GenerateTask
    answer: tuple[int, ...]


class Counterfactuals:
    """Measures one answer after the other, while nobody waits for the engine."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue(MAX_WAITING)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Measures until the block ends."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def consider(self, task: GenerateTask, answer: Sequence[int], shares: Sequence[tuple[str, float]]) -> None:
        """Takes a finished answer for each policy that edited it and wants this share of them."""
        if not 0 < len(answer) <= MAX_NEW_TOKENS:
            return
        made = {edit.origin.policy for edit in task.steering.edits if not edit.is_shadow}
        for policy, share in shares:
            if policy in made and _is_chosen(policy, task.call.request_id, share):
                with suppress(asyncio.QueueFull):
                    self._jobs.put_nowait(_Job(policy, task, tuple(answer)))

    async def _run(self) -> None:
        while True:
            job = await self._jobs.get()
            while self._engine.queued() or not self._engine.is_ready():
                await asyncio.sleep(IDLE_S)
            try:
                await self._measure(job)
            except SaeguardError as err:
                _log.warning("a counterfactual failed", extra={"fields": {"reason": err.reason}})

    async def _measure(self, job: _Job) -> None:
        call = replace(job.task.call, deadline=time.monotonic() + DEADLINE_S)
        task = replace(job.task, call=call)
        found = await measure_divergence(self._engine, task, job.answer, without_policy(task.steering, job.policy))
        self._metrics.policy_rules.observe_counterfactual(job.policy, sum(found) / len(found))


def without_policy(steering: Steering, policy: str) -> Steering:
    """The same steering but for what this policy edits."""
    kept = tuple(edit for edit in steering.edits if edit.origin.policy != policy)
    digest = hashlib.sha256(f"{steering.digest} without {policy}".encode()).hexdigest()
    return replace(steering, edits=kept, digest=digest)


def _is_chosen(policy: str, request_id: str, share: float) -> bool:
    """By a stable hash, so that a test and an investigation find the same requests."""
    drawn = hashlib.blake2b(f"{policy} {request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn) < share * 2**64


# What is kept of a request beside its answer: its audit record, what rules did, a measure of what they changed.


CANCELLED = "CANCELLED"
"""Outcome of a request whose caller went away."""


@dataclass(frozen=True, slots=True)
class CompiledRequest:
    """A generation that can start."""

    task: GenerateTask
    facts: PolicyFacts | None = None
    """None on a server without policies."""
    requires_audit: bool = False
    """Whether a policy wants it to fail when it cannot be recorded."""
    counterfactual: tuple[tuple[str, float], ...] = ()
    """Policies to be measured, and on which share of the requests."""


class RequestRecorder:
    """Keeps them for every generation; by default nothing."""

    def __init__(
        self,
        audit: Audit | None = None,
        rules: PolicyMetrics | None = None,
        counterfactuals: Counterfactuals | None = None,
    ) -> None:
        self._audit, self._rules, self._counterfactuals = audit or Audit(), rules, counterfactuals

    @contextmanager
    def request(
        self, request: GenerateRequest, call: Call, *, is_comparison: bool = False
    ) -> Iterator[RecordedRequest]:
        """Around one generation; what is raised in it is its outcome."""
        audit = self._audit.request(call, request, is_comparison=is_comparison)
        try:
            yield RecordedRequest(self, audit)
        except SaeguardError as err:
            audit.fail(err.reason)
            raise
        except BaseException:
            audit.fail(CANCELLED)
            raise

    def finished(self, ready: CompiledRequest, last: StreamChunk, answer: list[int]) -> None:
        """A request was answered to its end."""
        assert last.completion is not None, "the last chunk has the completion"
        if self._rules is not None:
            self._rules.observe(last.completion)
        if self._counterfactuals is not None:
            self._counterfactuals.consider(ready.task, answer, ready.counterfactual)


class RecordedRequest:
    """One generation on its way."""

    def __init__(self, keeping: RequestRecorder, audit: RequestAudit) -> None:
        self._keeping, self._audit = keeping, audit
        self._ready: CompiledRequest | None = None
        self._answer: list[int] = []

    async def admit(self, ready: CompiledRequest) -> None:
        """Before any work of the engine.

        Raises:
            Unavailable: it must be audited, and cannot be.
        """
        self._ready = ready
        await self._audit.admit(ready.facts, ready.task.seed, required=ready.requires_audit)

    async def tell(self, chunk: StreamChunk) -> None:
        """Before a chunk is sent.

        Raises:
            Unavailable: it is the last of a request that must be audited, and cannot be.
        """
        assert self._ready is not None, "it was admitted"
        self._answer += [token.id for token in chunk.tokens]
        if chunk.completion is not None:
            await self._audit.finish(chunk.completion, self._ready.task.tokens, self._answer)
            self._keeping.finished(self._ready, chunk, self._answer)


class Generation:
    """Text from the model, one request at a time to its callers, many at once in the engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        limits: LimitSettings,
        gate: Admission,
        policies: Policies | None = None,
        keeping: RequestRecorder | None = None,
    ) -> None:
        """``policies`` is None where the server has none: then only the caller decides."""
        self._keeping = keeping or RequestRecorder()
        self._engine, self._tokenizer, self._limits, self._gate = engine, tokenizer, limits, gate
        self._policies = policies

    async def stream(self, request: GenerateRequest, call: Call) -> AsyncGenerator[StreamChunk]:
        """Chunks as they are made; the last has a completion. Closing it frees the slot at the next step.

        Raises:
            UnknownName, InvalidRequest: what cannot be served as asked, by field, before any work.
            PermissionDenied, QuotaExceeded, PolicyRefusal: what this caller may not, before any work.
            PoliciesUnavailable, ActivationNotReached, NotConfigured: nobody knows what must be enforced.
            DeadlineExceeded, NonFiniteOutput, Unavailable, InternalFailure: from the engine.
        """
        with self._keeping.request(request, call) as kept, self._gate.request(call.caller, request) as spending:
            ready = await self.prepare(request, call)
            task, facts = ready.task, ready.facts
            most = len(task.tokens) + task.max_new_tokens
            spending.take(most)
            await kept.admit(ready)
            async with self._gate.turn(call.caller, most), aclosing(self._engine.generate(task)) as chunks:
                spending.use(len(task.tokens))
                async for chunk in chunks:
                    spending.use(len(chunk.tokens))
                    whole_chunk = finished(chunk, call, facts)
                    await kept.tell(whole_chunk)
                    yield whole_chunk

    async def prepare(self, request: GenerateRequest, call: Call) -> CompiledRequest:
        """What the engine is asked to do, under the policies that are in force now: the request keeps them.

        Raises:
            SaeguardError: as for ``stream``, but for what the engine raises.
        """
        snapshot = await self._snapshot(request, call)
        return await asyncio.to_thread(self._prepare, request, call, snapshot)

    async def _snapshot(self, request: GenerateRequest, call: Call) -> Snapshot | None:
        if self._policies is not None:
            least = request.min_policy_activation
            return self._policies.current() if least is None else await self._policies.at_least(least, call.deadline)
        if request.policies:
            raise UnknownName("policies[0]", "this server has no policies")
        if request.min_policy_activation is not None:
            raise NotConfigured("min_policy_activation: this server has no policies")
        return None

    def _prepare(self, request: GenerateRequest, call: Call, snapshot: Snapshot | None) -> CompiledRequest:
        watch = []
        for index, ref in enumerate(request.watch):
            check_watchable(find_feature(self._engine, ref, f"watch[{index}]"), f"watch[{index}].sae")
            watch.append((ref.sae, ref.feature))
        tokens = encode_prompt(self._tokenizer, request.input).ids
        context = self._engine.model.max_context
        check_length(request.input, len(tokens), context - 1)
        asked = request.sampling.max_new_tokens or self._limits.default_max_new_tokens
        new = min(asked, context - len(tokens))
        edits, triggers, limit, found = self._wanted(request, call, snapshot)
        # The last token is read only where a trigger may stop it from being sent.
        last = len(tokens) + new - 1
        read = last + may_stop(triggers, last, len(tokens))
        steering = steer(edits, triggers, limit, TokenRange(tokens, read, self._tokenizer.special_ids))
        seed = request.sampling.seed
        task = GenerateTask(
            call=call,
            tokens=tokens,
            sampling=request.sampling,
            max_new_tokens=new,
            seed=secrets.randbits(63) if seed is None else seed,
            steering=steering,
            watch=tuple(watch),
        )
        if found is None:
            return CompiledRequest(task)
        return CompiledRequest(task, found.facts, found.requires_audit, found.counterfactual)

    def _wanted(
        self, request: GenerateRequest, call: Call, snapshot: Snapshot | None
    ) -> tuple[list[PreparedEdit], list[PreparedTrigger], float | None, resolve.Resolution | None]:
        """Edits, triggers, the limit of those that are limited, and what policies had to do with it."""
        if snapshot is None:
            edits = [prepare_edit(self._engine, one) for one in own_edits(request.interventions)]
            triggers = [prepare_trigger(self._engine, one) for one in own_triggers(request.triggers)]
            return edits, triggers, request.max_relative_edit, None
        found = resolve.resolve_policies(request, call.caller, snapshot, datetime.now(UTC))
        return *prepared_parts(found.edits, found.triggers), found.max_relative_edit, found


def finished(chunk: StreamChunk, call: Call, facts: PolicyFacts | None) -> StreamChunk:
    """The chunk; the last one says whose request it was, and which policies decided."""
    if chunk.completion is None:
        return chunk
    return replace(chunk, completion=replace(chunk.completion, request_id=call.request_id, policy=facts))


# Compare: one request with everything that is done to it and without any of that, side by side in one batch.


class Compare:
    """Runs a request twice at once, and reads the steered answer once more, with and without."""

    def __init__(
        self, engine: Engine, generate: Generation, gate: Admission, keeping: RequestRecorder | None = None
    ) -> None:
        self._engine, self._generate, self._gate = engine, generate, gate
        self._keeping = keeping or RequestRecorder()

    async def run(self, request: GenerateRequest, call: Call) -> Comparison:
        """The comparison.

        Raises:
            InvalidRequest: too many tokens, prompt log-probabilities, or an engine that cannot measure.
            SaeguardError: as for a generation.
        """
        self._check(request)
        keeping = self._keeping.request(request, call, is_comparison=True)
        with keeping as kept, self._gate.request(call.caller, request) as spending:
            ready = await self._generate.prepare(request, call)
            task = ready.task
            if task.max_new_tokens > MAX_NEW_TOKENS:
                raise InvalidRequest("sampling.max_new_tokens", f"at most {MAX_NEW_TOKENS} here")
            # Two answers, and one of them read twice.
            most = 4 * (len(task.tokens) + task.max_new_tokens)
            spending.take(most)
            await kept.admit(ready)
            async with self._gate.turn(call.caller, most):
                plain = replace(task, steering=Steering())
                steered, unsteered = await asyncio.gather(whole(self._engine, task), whole(self._engine, plain))
                kl = await measure_divergence(self._engine, task, token_ids(steered), Steering())
            spending.use(4 * len(task.tokens) + 3 * len(token_ids(steered)) + len(token_ids(unsteered)))
            steered = tuple(finished(chunk, call, ready.facts) for chunk in steered)
            unsteered = tuple(finished(chunk, call, None) for chunk in unsteered)
            for chunk in steered:
                await kept.tell(chunk)
        divergence = first_divergence(token_ids(steered), token_ids(unsteered))
        return Comparison(join_chunks(steered), join_chunks(unsteered), divergence, kl)

    def _check(self, request: GenerateRequest) -> None:
        if not self._engine.capabilities.compares:
            raise InvalidRequest("request", f"the {self._engine.capabilities.engine} engine cannot compare")
        if request.sampling.prompt_logprobs:
            raise InvalidRequest("sampling.prompt_logprobs", "must not be set here")


def first_divergence(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; where one ends, that of its end."""
    pairs = enumerate(zip_longest(one, other))
    return next((index for index, (a, b) in pairs if a != b), None)
