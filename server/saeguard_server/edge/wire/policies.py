"""Policies as callers write them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from saeguard.v1 import policy_service_pb2 as pb
from saeguard_server.edge.wire.conditions import triggers
from saeguard_server.edge.wire.fields import at, at_most, named
from saeguard_server.edge.wire.interventions import feature_refs, intervention
from saeguard_server.guard.policy.model import (
    MAX_RULES,
    HashBy,
    Limits,
    Mode,
    Pins,
    Policy,
    Rollout,
    Rule,
    Target,
)

MODES: Mapping[int, Mode] = {
    pb.POLICY_MODE_OFF: "off",
    pb.POLICY_MODE_SHADOW: "shadow",
    pb.POLICY_MODE_ENFORCE: "enforce",
}
HASHED_BY: Mapping[int, HashBy] = {
    pb.ROLLOUT_BY_UNSPECIFIED: "caller",
    pb.ROLLOUT_BY_CALLER: "caller",
    pb.ROLLOUT_BY_CONVERSATION: "conversation",
}


def policy(message: pb.Policy, max_edits: int) -> Policy:
    """A policy, valid in itself.

    Args:
        max_edits: in one trigger's ``apply``.

    Raises:
        InvalidRequest: names the field, such as ``policy.rules[2].intervention.clamp.value``.
    """
    path = "policy"
    at_most(MAX_RULES, message.rules, f"{path}.rules")
    mode = named(MODES, message.mode, f"{path}.mode")
    rollout = _rollout(message.rollout, f"{path}.rollout")
    rules = tuple(_rule(one, f"{path}.rules[{index}]") for index, one in enumerate(message.rules))
    watching = triggers(message.triggers, MAX_RULES, max_edits, f"{path}.triggers")
    limits = _limits(message.limits, f"{path}.limits")
    expires = _time(message.expires, f"{path}.expires") if message.HasField("expires") else None
    target = message.target
    with at(path):
        return Policy(
            name=message.name,
            description=message.description,
            owner=message.owner,
            mode=mode,
            target=Target(callers=tuple(target.callers), tags=tuple(target.tags), models=tuple(target.models)),
            rollout=rollout,
            rules=rules,
            triggers=watching,
            limits=limits,
            pins=Pins(model=message.pins.model or None, saes=tuple(sorted(message.pins.saes.items()))),
            expires=expires,
            counterfactual_share=message.counterfactual_share,
            requires_audit=message.requires_audit,
        )


def _rollout(message: pb.PolicyRollout, path: str) -> Rollout:
    by = named(HASHED_BY, message.by, f"{path}.by")
    with at(path):
        return Rollout(share=message.share if message.HasField("share") else 1.0, by=by)


def _rule(message: pb.PolicyRule, path: str) -> Rule:
    edit = intervention(message.intervention, f"{path}.intervention")
    with at(path):
        return Rule(message.name, edit)


def _limits(message: pb.PolicyLimits, path: str) -> Limits:
    allowed = (
        feature_refs(message.allowed_features.features, f"{path}.allowed_features.features")
        if message.HasField("allowed_features")
        else None
    )
    denied = feature_refs(message.denied_features, f"{path}.denied_features")
    with at(path):
        return Limits(
            max_relative_edit=message.max_relative_edit if message.HasField("max_relative_edit") else None,
            allowed_saes=tuple(message.allowed_saes.saes) if message.HasField("allowed_saes") else None,
            denied_saes=tuple(message.denied_saes),
            allowed_features=allowed,
            denied_features=denied,
        )


def _time(message: Timestamp, path: str) -> datetime:
    with at(path):
        return message.ToDatetime(tzinfo=UTC)
