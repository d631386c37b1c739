"""Policies, revisions and activations as messages: what is read back is what was written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from datetime import datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from saeguard.v1 import condition_pb2, generation_service_pb2, policy_service_pb2
from saeguard.v1 import intervention_pb2 as edit_pb
from saeguard_server.edge.wire import interventions as wire
from saeguard_server.edge.wire import policies
from saeguard_server.guard.policy.administration import Written
from saeguard_server.guard.policy.changes import PolicyChange
from saeguard_server.guard.policy.model import Activation, Limits, Policy, Revision
from saeguard_server.guard.policy.store.protocol import Change
from saeguard_server.interventions import Apply, Condition, FeatureRef, Intervention, Scope, Trigger

pb = policy_service_pb2


def policy_message(of: Policy) -> pb.Policy:
    """A policy as a message."""
    message = pb.Policy(
        name=of.name,
        description=of.description,
        owner=of.owner,
        mode=_number(policies.MODES, of.mode),
        target=pb.PolicyTarget(callers=of.target.callers, tags=of.target.tags, models=of.target.models),
        rollout=pb.PolicyRollout(share=of.rollout.share, by=_number(policies.HASHED_BY, of.rollout.by)),
        rules=[pb.PolicyRule(name=rule.name, intervention=_intervention(rule.intervention)) for rule in of.rules],
        triggers=[_trigger(one) for one in of.triggers],
        limits=_limits(of.limits),
        pins=pb.PolicyPins(model=of.pins.model or "", saes=dict(of.pins.saes)),
        counterfactual_share=of.counterfactual_share,
        requires_audit=of.requires_audit,
    )
    if of.expires is not None:
        message.expires.FromDatetime(of.expires)
    return message


def activation_message(of: Activation) -> pb.Activation:
    """An act as a message."""
    return pb.Activation(
        number=of.number, revision=of.revision, actor=of.actor, time=timestamp(of.time), reason=of.reason
    )


def revision(of: Revision) -> pb.Revision:
    """A revision as a message, without what it changed."""
    return pb.Revision(number=of.number, author=of.author, time=timestamp(of.time), reason=of.reason)


def change(of: Change) -> pb.Revision:
    """A revision of the history, with what it changed."""
    return pb.Revision(
        number=of.number, author=of.author, time=timestamp(of.time), reason=of.reason, diff=_diff(of.policies)
    )


def written(of: Written) -> pb.Revision:
    """What a change came to; of a trial only what would change."""
    message = pb.Revision() if of.revision is None else revision(of.revision)
    message.diff = _diff(of.changes)
    return message


def findings(of: Written) -> list[pb.PolicyFinding]:
    """What was noticed about the policies."""
    return [pb.PolicyFinding(message=one) for one in of.warnings]


def timestamp(time: datetime) -> Timestamp:
    """A time with a zone as a message."""
    message = Timestamp()
    message.FromDatetime(time)
    return message


def _diff(changes: Iterable[PolicyChange]) -> str:
    return "".join(one.diff for one in changes)


def _limits(of: Limits) -> pb.PolicyLimits:
    message = pb.PolicyLimits(
        max_relative_edit=of.max_relative_edit, denied_saes=of.denied_saes, denied_features=_refs(of.denied_features)
    )
    # Present and empty is not the same as absent.
    if of.allowed_saes is not None:
        message.allowed_saes.CopyFrom(pb.AllowedSaes(saes=of.allowed_saes))
    if of.allowed_features is not None:
        message.allowed_features.CopyFrom(pb.AllowedFeatures(features=_refs(of.allowed_features)))
    return message


def _refs(features: Iterable[FeatureRef]) -> list[generation_service_pb2.FeatureRef]:
    return [generation_service_pb2.FeatureRef(sae=one.sae, feature=one.feature) for one in features]


def _trigger(of: Trigger) -> condition_pb2.Trigger:
    message = condition_pb2.Trigger(name=of.name, when=_condition(of.when))
    if isinstance(of.action, Apply):
        message.apply.interventions.extend(_intervention(one) for one in of.action.interventions)
    else:
        getattr(message, type(of.action).__name__.lower()).SetInParent()
    return message


def _intervention(of: Intervention) -> edit_pb.Intervention:
    message = edit_pb.Intervention(sae=of.target.sae, feature=of.target.feature, scope=_scope(of.scope))
    body = getattr(message, of.edit.kind)
    body.SetInParent()
    for field in fields(of.edit):
        value = getattr(of.edit, field.name)
        setattr(body, field.name, _number(wire.UNITS, value) if field.name == "unit" else value)
    if of.when is not None:
        message.when.CopyFrom(_condition(of.when))
    return message


def _condition(of: Condition) -> edit_pb.Condition:
    return edit_pb.Condition(
        terms=[edit_pb.Term(sae=one.feature.sae, feature=one.feature.feature, weight=one.weight) for one in of.terms],
        bias=of.bias,
        comparison=_number(wire.COMPARISONS, of.comparison),
        threshold=of.threshold,
        release=of.release,
        unit=_number(wire.UNITS, of.unit),
        window=edit_pb.Window(kind=_number(wire.WINDOWS, of.window.kind), tokens=of.window.tokens, k=of.window.k),
        scope=_scope(of.scope),
    )


def _scope(of: Scope) -> edit_pb.Scope:
    return edit_pb.Scope(
        phase=_number(wire.PHASES, of.phase),
        start=of.start,
        end=of.end,
        include_special_tokens=of.include_special_tokens,
    )


def _number(names: Any, name: str) -> Any:
    """The enum's number of a name; of two, the one that is not UNSPECIFIED."""
    return max(number for number, known in names.items() if known == name)
