"""What is kept of a request beside its answer: its audit record, what rules did, a measure of what they changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from saeguard_server.engine.protocol import GenerateTask
from saeguard_server.errors import SaeguardError
from saeguard_server.flows.counterfactual import Counterfactuals
from saeguard_server.guard.audit.audit import Audit, RequestAudit
from saeguard_server.observe.policy_metrics import PolicyMetrics
from saeguard_server.reply import Chunk, PolicyFacts
from saeguard_server.request import Call, GenerationRequest

CANCELLED = "CANCELLED"
"""Outcome of a request whose caller went away."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A generation that can start."""

    task: GenerateTask
    facts: PolicyFacts | None = None
    """None on a server without policies."""
    requires_audit: bool = False
    """Whether a policy wants it to fail when it cannot be recorded."""
    counterfactual: tuple[tuple[str, float], ...] = ()
    """Policies to be measured, and on which share of the requests."""


class Keeping:
    """Keeps them for every generation; by default nothing."""

    def __init__(
        self,
        audit: Audit | None = None,
        rules: PolicyMetrics | None = None,
        counterfactuals: Counterfactuals | None = None,
    ) -> None:
        self._audit, self._rules, self._counterfactuals = audit or Audit(), rules, counterfactuals

    @contextmanager
    def request(self, request: GenerationRequest, call: Call, *, is_comparison: bool = False) -> Iterator[Kept]:
        """Around one generation; what is raised in it is its outcome."""
        audit = self._audit.request(call, request, is_comparison=is_comparison)
        try:
            yield Kept(self, audit)
        except SaeguardError as err:
            audit.fail(err.reason)
            raise
        except BaseException:
            audit.fail(CANCELLED)
            raise

    def finished(self, ready: Prepared, last: Chunk, answer: list[int]) -> None:
        """A request was answered to its end."""
        assert last.completion is not None, "the last chunk has the completion"
        if self._rules is not None:
            self._rules.observe(last.completion)
        if self._counterfactuals is not None:
            self._counterfactuals.consider(ready.task, answer, ready.counterfactual)


class Kept:
    """One generation on its way."""

    def __init__(self, keeping: Keeping, audit: RequestAudit) -> None:
        self._keeping, self._audit = keeping, audit
        self._ready: Prepared | None = None
        self._answer: list[int] = []

    async def admit(self, ready: Prepared) -> None:
        """Before any work of the engine.

        Raises:
            Unavailable: it must be audited, and cannot be.
        """
        self._ready = ready
        await self._audit.admit(ready.facts, ready.task.seed, required=ready.requires_audit)

    async def tell(self, chunk: Chunk) -> None:
        """Before a chunk is sent.

        Raises:
            Unavailable: it is the last of a request that must be audited, and cannot be.
        """
        assert self._ready is not None, "it was admitted"
        self._answer += [token.id for token in chunk.tokens]
        if chunk.completion is not None:
            await self._audit.finish(chunk.completion, self._ready.task.tokens, self._answer)
            self._keeping.finished(self._ready, chunk, self._answer)
