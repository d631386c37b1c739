"""The way into the engine: may this caller steer, has it quota left, and whose turn is it?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from itertools import chain

from saeguard_server.caller import Caller, Role
from saeguard_server.guard.fairness import Queue, Turns
from saeguard_server.guard.identity import access
from saeguard_server.guard.quotas import Quotas, Spending
from saeguard_server.interventions import Apply, Condition, FeatureRef, Intervention, Trigger
from saeguard_server.observe.metrics import Metrics
from saeguard_server.request import ActivationRequest, GenerationRequest, Named


class Gate:
    """Between a checked request and the engine."""

    def __init__(self, engine: Queue, metrics: Metrics, slots: int) -> None:
        self.turns = Turns(engine, metrics, slots)
        self._quotas = Quotas(metrics)

    @contextmanager
    def request(self, caller: Caller, request: GenerationRequest | ActivationRequest) -> Iterator[Spending]:
        """Around everything that is done for a request.

        Raises:
            PermissionDenied: it steers, and the caller may not.
            QuotaExceeded: it names too many features, or too many of the caller's requests run.
        """
        triggers = request.triggers if isinstance(request, GenerationRequest) else ()
        if request.interventions or triggers:
            access.check(caller, Role.STEER, "a request with interventions or triggers")
        with self._quotas.request(caller, len(features(request))) as spending:
            yield spending

    def turn(self, caller: Caller, tokens: int) -> AbstractAsyncContextManager[None]:
        """Waits for the turn of a task that can take so many tokens; around its time in the engine."""
        return self.turns.turn(caller.name, tokens)


def features(request: GenerationRequest | ActivationRequest) -> set[FeatureRef]:
    """Every feature that the request names: edited, watched, read by itself, or in a condition."""
    found = set(chain.from_iterable(map(_of_edit, request.interventions)))
    if isinstance(request, GenerationRequest):
        return found.union(request.watch, *map(_of_trigger, request.triggers))
    return found.union(request.selection.features if isinstance(request.selection, Named) else ())


def _of_edit(one: Intervention) -> set[FeatureRef]:
    return {one.target} | (_of_condition(one.when) if one.when is not None else set())


def _of_trigger(one: Trigger) -> set[FeatureRef]:
    edits = one.action.interventions if isinstance(one.action, Apply) else ()
    return _of_condition(one.when).union(*map(_of_edit, edits))


def _of_condition(one: Condition) -> set[FeatureRef]:
    return {term.feature for term in one.terms}
