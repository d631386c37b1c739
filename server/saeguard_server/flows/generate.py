"""Generate: from a checked request to chunks of text, steered as asked or refused before any work."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime

from saeguard_server.engine.protocol import Engine, GenerateTask
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.errors import NotConfigured, UnknownName
from saeguard_server.flows.conditions import check_terms
from saeguard_server.flows.keeping import Keeping, Prepared
from saeguard_server.flows.prompt import check_length, encode
from saeguard_server.flows.reach import Reach
from saeguard_server.flows.served import check_watchable, find_feature
from saeguard_server.flows.serving import prepared
from saeguard_server.flows.steering import (
    PreparedEdit,
    PreparedTrigger,
    may_stop,
    prepare_edit,
    prepare_trigger,
    steer,
    wanted_edits,
    wanted_triggers,
)
from saeguard_server.guard.gate import Gate
from saeguard_server.guard.policy import resolution
from saeguard_server.guard.policy.snapshot import Policies, Snapshot
from saeguard_server.reply import Chunk, PolicyFacts
from saeguard_server.request import Call, GenerationRequest
from saeguard_server.settings import LimitSettings


class Generate:
    """Text from the model, one request at a time to its callers, many at once in the engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        limits: LimitSettings,
        gate: Gate,
        policies: Policies | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        """``policies`` is None where the server has none: then only the caller decides."""
        self._keeping = keeping or Keeping()
        self._engine, self._tokenizer, self._limits, self._gate = engine, tokenizer, limits, gate
        self._policies = policies

    async def stream(self, request: GenerationRequest, call: Call) -> AsyncGenerator[Chunk]:
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
                    told = chunk if facts is None else with_facts(chunk, facts)
                    await kept.tell(told)
                    yield told

    async def prepare(self, request: GenerationRequest, call: Call) -> Prepared:
        """What the engine is asked to do, under the policies that are in force now: the request keeps them.

        Raises:
            SaeguardError: as for ``stream``, but for what the engine raises.
        """
        snapshot = await self._snapshot(request, call)
        return await asyncio.to_thread(self._prepare, request, call, snapshot)

    async def _snapshot(self, request: GenerationRequest, call: Call) -> Snapshot | None:
        if self._policies is not None:
            least = request.min_policy_activation
            return self._policies.current() if least is None else await self._policies.at_least(least, call.deadline)
        if request.policies:
            raise UnknownName("policies[0]", "this server has no policies")
        if request.min_policy_activation is not None:
            raise NotConfigured("min_policy_activation: this server has no policies")
        return None

    def _prepare(self, request: GenerationRequest, call: Call, snapshot: Snapshot | None) -> Prepared:
        watch = []
        for index, ref in enumerate(request.watch):
            check_watchable(find_feature(self._engine, ref, f"watch[{index}]"), f"watch[{index}].sae")
            watch.append((ref.sae, ref.feature))
        check_terms(request.interventions, request.triggers, self._limits.max_condition_terms)
        tokens = encode(self._tokenizer, request.prompt).ids
        context = self._engine.model.max_context
        check_length(request.prompt, len(tokens), context - 1)
        asked = request.sampling.max_new_tokens or self._limits.default_max_new_tokens
        new = min(asked, context - len(tokens))
        edits, triggers, limit, found = self._wanted(request, call, snapshot)
        # The last token is read only where a trigger may stop it from being sent.
        last = len(tokens) + new - 1
        read = last + may_stop(triggers, last, len(tokens))
        steering = steer(edits, triggers, limit, Reach(tokens, read, self._tokenizer.special_ids))
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
            return Prepared(task)
        return Prepared(task, found.facts, found.requires_audit, found.counterfactual)

    def _wanted(
        self, request: GenerationRequest, call: Call, snapshot: Snapshot | None
    ) -> tuple[list[PreparedEdit], list[PreparedTrigger], float | None, resolution.Resolution | None]:
        """Edits, triggers, the limit of those that are limited, and what policies had to do with it."""
        if snapshot is None:
            edits = [prepare_edit(self._engine, one) for one in wanted_edits(request.interventions)]
            triggers = [prepare_trigger(self._engine, one) for one in wanted_triggers(request.triggers)]
            return edits, triggers, request.max_relative_edit, None
        found = resolution.resolve(request, call.caller, snapshot, datetime.now(UTC))
        return *prepared(found.edits, found.triggers), found.max_relative_edit, found


def with_facts(chunk: Chunk, facts: PolicyFacts) -> Chunk:
    """The chunk; the last one says which policies decided."""
    if chunk.completion is None:
        return chunk
    return replace(chunk, completion=replace(chunk.completion, policy=facts))
