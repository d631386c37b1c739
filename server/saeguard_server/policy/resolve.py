"""What becomes of a request under the policies in force: one pure function, whose only memory is the snapshot's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from saeguard.requests import GenerateRequest
from saeguard.results import PolicyFacts
from saeguard.types import FeatureRef
from saeguard_server.caller import Caller
from saeguard_server.engine.protocol import Origin
from saeguard_server.errors import InvalidRequest, PoliciesUnavailable, PolicyRefusal, UnknownName
from saeguard_server.policy.compile import Snapshot
from saeguard_server.policy.model import Policy, PolicyLimits, Target
from saeguard_server.policy.rules import (
    Clash,
    CompiledRule,
    CompiledTrigger,
    Selected,
    Selection,
    is_chosen,
    smallest,
    tighten,
    trigger_edits,
)
from saeguard_server.steering import EditPart, TriggerPart, Wanted, WantedTrigger


@dataclass(frozen=True, slots=True, eq=False)
class Resolution:
    """What is done to one request: what is enforced, then what is only counted, then what it asks itself."""

    edits: tuple[EditPart, ...]
    triggers: tuple[TriggerPart, ...]
    max_relative_edit: float | None
    """Of its own edits."""
    facts: PolicyFacts
    requires_audit: bool
    counterfactual: tuple[tuple[str, float], ...]
    """Policies to be measured, and on which share of the requests."""


def resolve_policies(request: GenerateRequest, caller: Caller, snapshot: Snapshot, now: datetime) -> Resolution:
    """The policies on this request, and its own wishes as far as they weaken none of them.

    Args:
        now: with a time zone; decides about policies that expire.

    Raises:
        UnknownName: it names a policy, SAE or feature that is not there.
        InvalidRequest: it names a policy that cannot act, or an edit that cannot be applied as it stands.
        PolicyRefusal: it asks for what a policy does not allow; field, policy and rule are named.
        PoliciesUnavailable: two policies on it cannot be kept together.
    """
    selected = _selected(request, caller, snapshot, now)
    if not request.interventions and not request.triggers:
        return _resolution(selected, selected.edits, selected.triggers, request.max_relative_edit)
    own = _Own(selected, snapshot)
    own.add_edits(request)
    own.add_triggers(request)
    edits = (*own.enforced(), *selected.shadow_edits, *(one.part for one in own.edits))
    enforced = (one.part for one in selected.enforced.triggers)
    triggers = (*enforced, *selected.shadow_triggers, *(one.part for one in own.triggers))
    return _resolution(selected, edits, triggers, own.limit(request.max_relative_edit))


def is_aimed_at(target: Target, caller: Caller, model: str) -> bool:
    """Whether each list that is not empty holds the caller, one of its tags, or the model."""
    return (
        (not target.callers or caller.name in target.callers)
        and (not target.tags or not caller.tags.isdisjoint(target.tags))
        and (not target.models or model in target.models)
    )


def _resolution(
    selected: Selected, edits: tuple[EditPart, ...], triggers: tuple[TriggerPart, ...], limit: float | None
) -> Resolution:
    return Resolution(edits, triggers, limit, selected.facts, selected.requires_audit, selected.counterfactual)


def _selected(request: GenerateRequest, caller: Caller, snapshot: Snapshot, now: datetime) -> Selected:
    try:
        return snapshot.selected(_selection(request, caller, snapshot, now))
    except Clash as err:
        if request.policies:
            raise PolicyRefusal("policies", str(err), policy=err.one.origin.policy, rule=err.one.origin.rule) from err
        raise PoliciesUnavailable(str(err)) from err


def _selection(request: GenerateRequest, caller: Caller, snapshot: Snapshot, now: datetime) -> Selection:
    asked = set()
    for index, name in enumerate(request.policies):
        _check_asked(name, f"policies[{index}]", snapshot, now)
        asked.add(name)
    model, conversation = snapshot.served.model_name, request.conversation
    return tuple(
        name
        for name, one in snapshot.ready.items()
        if not _is_over(one.policy, now)
        and (
            name in asked
            or (is_aimed_at(one.policy.target, caller, model) and is_chosen(one.policy, caller.name, conversation))
        )
    )


def _check_asked(name: str, field: str, snapshot: Snapshot, now: datetime) -> None:
    """Whoever asks for a policy must not get silently less."""
    if name not in snapshot.policies:
        raise UnknownName(field, f"no policy {name!r} is in force")
    policy = snapshot.policies[name]
    if policy.mode == "off":
        raise InvalidRequest(field, f"{name!r} is off")
    if _is_over(policy, now):
        raise InvalidRequest(field, f"{name!r} has expired")
    if name not in snapshot.ready:
        raise InvalidRequest(field, f"{name!r} is for other models")


def _is_over(policy: Policy, now: datetime) -> bool:
    return policy.expires is not None and policy.expires <= now


class _Own:
    """A request's own edits and triggers, put beside what is enforced."""

    def __init__(self, selected: Selected, snapshot: Snapshot) -> None:
        self.edits: list[CompiledRule] = []
        self.triggers: list[CompiledTrigger] = []
        self._selected, self._served = selected, snapshot.served
        self._in_place: dict[CompiledRule, CompiledRule] = {}
        self._became_rules = False

    def enforced(self) -> Iterable[EditPart]:
        """What is enforced, in its order, tightened where the request asks for it."""
        return (self._in_place.get(rule, rule).part for rule in self._selected.enforced.edits)

    def limit(self, asked: float | None) -> float | None:
        """Of the request's own edits; none where each became part of a rule."""
        if self.edits or any(one.edits for one in self.triggers):
            return smallest((asked, self._selected.max_relative_edit))
        return None if self._became_rules else asked

    def add_edits(self, request: GenerateRequest) -> None:
        for index, one in enumerate(request.interventions):
            wanted = Wanted(intervention=one, field=f"interventions[{index}]")
            self._check_allowed(one.ref, wanted.field)
            asked = CompiledRule.of(wanted, self._served.edit(wanted))
            change = tighten(self._rules(one.ref), asked, self._served)
            if change is None:
                self.edits.append(asked)
                continue
            self._became_rules = True
            rule, tighter = change
            if tighter is not None:
                self._in_place[rule] = tighter

    def add_triggers(self, request: GenerateRequest) -> None:
        for index, one in enumerate(request.triggers):
            wanted = WantedTrigger(trigger=one, field=f"triggers[{index}]", origin=Origin(rule=one.name))
            for number, edit in enumerate(trigger_edits(one)):
                self._check_allowed(edit.ref, f"{wanted.field}.apply.interventions[{number}]")
            trigger = CompiledTrigger.of(wanted, self._served.trigger(wanted))
            met = {
                number
                for number, edit in enumerate(trigger.edits)
                if tighten(self._rules(edit.target), edit, self._served) is not None
            }
            self._became_rules |= bool(met)
            self.triggers.append(trigger.without(met, self._served))

    def _rules(self, target: FeatureRef) -> tuple[CompiledRule, ...]:
        return self._selected.enforced.by_feature.get(target, ())

    def _check_allowed(self, target: FeatureRef, field: str) -> None:
        for policy, limits in self._selected.limits:
            _check_limits(policy, limits, target, field)


def _check_limits(policy: str, limits: PolicyLimits, target: FeatureRef, field: str) -> None:
    saes, features = limits.allowed_saes, limits.allowed_features
    if target.sae in limits.denied_saes or (saes is not None and target.sae not in saes):
        raise PolicyRefusal(f"{field}.sae", f"callers may not edit features of {target.sae!r}", policy=policy)
    if target in limits.denied_features or (features is not None and target not in features):
        raise PolicyRefusal(
            f"{field}.feature", f"callers may not edit feature {target.feature} of {target.sae!r}", policy=policy
        )
