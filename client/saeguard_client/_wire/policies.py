"""PolicyService: policies as YAML documents, their revisions, what is in force."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from saeguard.v1 import policy_service_pb2 as pb
from saeguard_client import _checks
from saeguard_client._wire.mirror import decode
from saeguard_client.calls import PerCall, UnaryCall
from saeguard_client.policies import (
    Activation,
    PolicyChange,
    PolicyFinding,
    PolicyHistory,
    PolicySet,
    PolicySummary,
    Revision,
)

T = TypeVar("T")
R = TypeVar("R", bound=Message)

_SERVICE = pb.DESCRIPTOR.services_by_name["PolicyService"].full_name


def listed(revision: int | None, options: PerCall) -> UnaryCall[PolicySet]:
    """ListPolicies."""
    number = None if revision is None else _checks.whole("revision", revision, _checks.MAX_UINT64)
    asked = pb.ListPoliciesRequest(revision=number)
    return _call("ListPolicies", asked, pb.ListPoliciesResponse, _set, options)


def applied(
    documents: Mapping[str, str], etag: str, reason: str, prune: bool, dry_run: bool, options: PerCall
) -> UnaryCall[PolicyChange]:
    """ApplyPolicies."""
    asked = pb.ApplyPoliciesRequest(
        documents=[
            pb.PolicyDocument(name=_checks.text("documents", name), content=_checks.text(f"documents[{name!r}]", text))
            for name, text in documents.items()
        ],
        etag=_checks.text("etag", etag),
        reason=_checks.text("reason", reason),
        prune=_checks.flag("prune", prune),
        dry_run=_checks.flag("dry_run", dry_run),
    )
    return _call("ApplyPolicies", asked, pb.ApplyPoliciesResponse, _change, options)


def deleted(name: str, etag: str, reason: str, options: PerCall) -> UnaryCall[PolicyChange]:
    """DeletePolicy."""
    asked = pb.DeletePolicyRequest(
        name=_checks.text("name", name), etag=_checks.text("etag", etag), reason=_checks.text("reason", reason)
    )
    return _call(
        "DeletePolicy",
        asked,
        pb.DeletePolicyResponse,
        lambda reply: PolicyChange(_revision(reply.revision), reply.etag, ()),
        options,
    )


def activated(revision: int, reason: str, expected_activation: int, options: PerCall) -> UnaryCall[Activation]:
    """ActivateRevision."""
    asked = pb.ActivateRevisionRequest(
        revision=_checks.whole("revision", revision, _checks.MAX_UINT64),
        reason=_checks.text("reason", reason),
        expected_activation=_checks.whole("expected_activation", expected_activation, _checks.MAX_UINT64),
    )
    return _call(
        "ActivateRevision",
        asked,
        pb.ActivateRevisionResponse,
        lambda reply: _activation(reply.activation),
        options,
    )


def rolled_back(revision: int | None, reason: str, expected_activation: int, options: PerCall) -> UnaryCall[Activation]:
    """Rollback."""
    request = pb.RollbackRequest(
        revision=None if revision is None else _checks.whole("revision", revision, _checks.MAX_UINT64),
        reason=_checks.text("reason", reason),
        expected_activation=_checks.whole("expected_activation", expected_activation, _checks.MAX_UINT64),
    )
    return _call("Rollback", request, pb.RollbackResponse, lambda reply: _activation(reply.activation), options)


def history(limit: int | None, options: PerCall) -> UnaryCall[PolicyHistory]:
    """ListHistory."""
    asked = pb.ListHistoryRequest(limit=None if limit is None else _checks.whole("limit", limit))
    return _call(
        "ListHistory",
        asked,
        pb.ListHistoryResponse,
        lambda reply: PolicyHistory(
            tuple(_revision(one) for one in reply.revisions), tuple(_activation(one) for one in reply.activations)
        ),
        options,
    )


def _call(method: str, asked: Message, reply: type[R], read: Callable[[R], T], options: PerCall) -> UnaryCall[T]:
    return UnaryCall(
        f"/{_SERVICE}/{method}", asked.SerializeToString(), lambda data: read(decode(reply, data)), options
    )


def _set(reply: pb.ListPoliciesResponse) -> PolicySet:
    return PolicySet(
        policies=tuple(_summary(policy) for policy in reply.policies),
        yaml=reply.yaml,
        etag=reply.etag,
        revision=_revision(reply.revision) if reply.HasField("revision") else None,
        active=_activation(reply.active) if reply.HasField("active") else None,
    )


def _summary(policy: pb.PolicySummary) -> PolicySummary:
    return PolicySummary(
        name=policy.name,
        mode=pb.PolicyMode.Name(policy.mode).removeprefix("POLICY_MODE_").lower(),
        owner=policy.owner,
        share=policy.share,
        rules=tuple(policy.rules),
        triggers=tuple(policy.triggers),
        expires=_time(policy.expires) if policy.HasField("expires") else None,
    )


def _change(reply: pb.ApplyPoliciesResponse) -> PolicyChange:
    findings = tuple(PolicyFinding(one.policy, one.message) for one in reply.findings)
    return PolicyChange(_revision(reply.revision), reply.etag, findings)


def _revision(message: pb.Revision) -> Revision:
    return Revision(message.number, message.author, _time(message.time), message.reason, message.diff)


def _activation(message: pb.Activation) -> Activation:
    return Activation(message.number, message.revision, message.actor, _time(message.time), message.reason)


def _time(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)
