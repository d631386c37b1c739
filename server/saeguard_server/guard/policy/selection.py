"""Which policies are on a request, and what they come to together: worked out once for each set of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from saeguard_server.guard.policy.combining import Combined, combine
from saeguard_server.guard.policy.model import Activation, Limits
from saeguard_server.guard.policy.prepared import ReadyPolicy
from saeguard_server.guard.policy.served import EditPart, Served, TriggerPart
from saeguard_server.reply import PolicyFacts

Selection: TypeAlias = tuple[str, ...]
"""Names of policies, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """Several policies as one."""

    enforced: Combined
    edits: tuple[EditPart, ...]
    """Of a request without its own: what is enforced, then what is only counted."""
    triggers: tuple[TriggerPart, ...]
    """In the same order."""
    shadow_edits: tuple[EditPart, ...]
    shadow_triggers: tuple[TriggerPart, ...]
    limits: tuple[tuple[str, Limits], ...]
    """What each enforced policy lets callers do, by the policy's name; those without limits are left out."""
    max_relative_edit: float | None
    """The smallest of them."""
    facts: PolicyFacts
    requires_audit: bool
    counterfactual: tuple[tuple[str, float], ...]
    """Policies to be measured, and on which share of the requests."""


def select(names: Selection, ready: Mapping[str, ReadyPolicy], activation: Activation, served: Served) -> Selected:
    """The rules of these policies together.

    Raises:
        Clash: two cannot be kept together. A revision with such two is refused when it is written, unless only a
            request's own ``policies`` can bring them together.
    """
    chosen = [ready[name] for name in names]
    enforcing = [one for one in chosen if one.policy.mode == "enforce"]
    shadows = [one for one in chosen if one.policy.mode == "shadow"]
    enforced = combine(
        [edit for one in enforcing for edit in one.edits],
        [trigger for one in enforcing for trigger in one.triggers],
        served,
    )
    shadow_edits = tuple(edit.part for one in shadows for edit in one.edits)
    shadow_triggers = tuple(trigger.part for one in shadows for trigger in one.triggers)
    limits = tuple((one.policy.name, one.policy.limits) for one in enforcing if one.policy.limits != Limits())
    return Selected(
        enforced=enforced,
        edits=(*(one.part for one in enforced.edits), *shadow_edits),
        triggers=(*(one.part for one in enforced.triggers), *shadow_triggers),
        shadow_edits=shadow_edits,
        shadow_triggers=shadow_triggers,
        limits=limits,
        max_relative_edit=smallest(one.max_relative_edit for _, one in limits),
        facts=PolicyFacts(
            activation=activation.number,
            revision=activation.revision,
            enforced=tuple(one.policy.name for one in enforcing),
            shadowed=tuple(one.policy.name for one in shadows),
        ),
        requires_audit=any(one.policy.requires_audit for one in chosen),
        counterfactual=tuple(
            (one.policy.name, one.policy.counterfactual_share) for one in enforcing if one.policy.counterfactual_share
        ),
    )


def smallest(limits: Iterable[float | None]) -> float | None:
    """The smallest limit that is one."""
    return min((one for one in limits if one is not None), default=None)
