"""Policies, revisions and activations as messages."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from saeguard.v1 import policy_service_pb2 as pb
from saeguard_server.policy.administration import Written
from saeguard_server.policy.document import PolicyChange
from saeguard_server.policy.model import Activation, Policy, Revision
from saeguard_server.policy.store.protocol import Change


def summary(policy: Policy) -> pb.PolicySummary:
    """A policy at a glance."""
    return pb.PolicySummary(
        name=policy.name,
        mode=pb.PolicyMode.Value(f"POLICY_MODE_{policy.mode.upper()}"),
        owner=policy.owner,
        share=policy.rollout.share,
        rules=[rule.name for rule in policy.rules],
        triggers=[trigger.name for trigger in policy.triggers],
        expires=None if policy.expires is None else timestamp(policy.expires),
    )


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
    return [pb.PolicyFinding(message=warning) for warning in of.warnings]


def timestamp(time: datetime) -> Timestamp:
    """A time with a zone as a message."""
    message = Timestamp()
    message.FromDatetime(time)
    return message


def _diff(changes: Iterable[PolicyChange]) -> str:
    return "".join(change.diff for change in changes)
