"""What policies change, measured on a share of the requests they edit: the same answer, read without the policy."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from saeguard_server.engine.protocol import Engine, GenerateTask, Steering
from saeguard_server.errors import SaeguardError
from saeguard_server.flows.measuring import MAX_NEW_TOKENS, divergence
from saeguard_server.observe.metrics import Metrics

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
        found = await divergence(self._engine, task, job.answer, without(task.steering, job.policy))
        self._metrics.policy_rules.observe_counterfactual(job.policy, sum(found) / len(found))


def without(steering: Steering, policy: str) -> Steering:
    """The same steering but for what this policy edits."""
    kept = tuple(edit for edit in steering.edits if edit.origin.policy != policy)
    digest = hashlib.sha256(f"{steering.digest} without {policy}".encode()).hexdigest()
    return replace(steering, edits=kept, digest=digest)


def _is_chosen(policy: str, request_id: str, share: float) -> bool:
    """By a stable hash, so that a test and an investigation find the same requests."""
    drawn = hashlib.blake2b(f"{policy} {request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn) < share * 2**64
