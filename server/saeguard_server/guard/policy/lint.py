"""What is odd about a policy although it can be enforced: most often it does less than its writer believes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from saeguard_sae.edits import Add, Scale
from saeguard_server.errors import InvalidRequest, UnknownName
from saeguard_server.guard.policy.findings import Finding
from saeguard_server.guard.policy.model import Limits, Policy
from saeguard_server.guard.policy.prepared import applied
from saeguard_server.guard.policy.served import Served
from saeguard_server.interventions import FeatureRef, Intervention, Scope


def warnings(policy: Policy, served: Served, now: datetime) -> Iterator[Finding]:
    """What a reviewer would ask about; ``now`` has a time zone."""
    for path, message in _about_itself(policy, served, now):
        yield Finding(policy.name, path, message)
    if policy.target.models and served.model_name not in policy.target.models:
        return
    for path, scope in _scopes(policy):
        if scope.start >= served.max_context:
            yield Finding(policy.name, f"{path}.start", f"is never reached: a request has {served.max_context} tokens")
    for path, one in _edits(policy):
        if (one.edit == Scale(1.0)) or (isinstance(one.edit, Add) and one.edit.value == 0):
            yield Finding(policy.name, f"{path}.{one.edit.kind}", "changes nothing")
        if not _has_label(one.target, served):
            where = f"feature {one.target.feature} of {one.target.sae!r}"
            yield Finding(policy.name, f"{path}.feature", f"{where} has no label in the catalogue")


def _about_itself(policy: Policy, served: Served, now: datetime) -> Iterator[tuple[str, str]]:
    if policy.mode == "off":
        yield "mode", "is off: the policy does nothing"
    if policy.mode == "shadow" and policy.limits != Limits():
        yield "limits", "are not enforced in shadow"
    if policy.rollout.share == 0:
        yield "rollout.share", "is 0: only requests that name the policy are under it"
    if policy.target.models and served.model_name not in policy.target.models:
        yield (
            "target.models",
            f"{served.model_name!r} is not among them: the policy never acts here, and is not checked",
        )
    if policy.expires is not None and policy.expires <= now:
        yield "expires", "is over: the policy does nothing"
    if policy.counterfactual_share and policy.mode != "enforce":
        yield "counterfactual_share", f"measures nothing in mode {policy.mode}"
    if not policy.owner:
        yield "owner", "is empty: nobody to ask"


def _edits(policy: Policy) -> Iterator[tuple[str, Intervention]]:
    for index, rule in enumerate(policy.rules):
        yield f"rules[{index}]", rule.intervention
    for index, trigger in enumerate(policy.triggers):
        for number, one in enumerate(applied(trigger)):
            yield f"triggers[{index}].apply.interventions[{number}]", one


def _scopes(policy: Policy) -> Iterator[tuple[str, Scope]]:
    for path, one in _edits(policy):
        yield f"{path}.scope", one.scope
        if one.when is not None:
            yield f"{path}.when.scope", one.when.scope
    for index, trigger in enumerate(policy.triggers):
        yield f"triggers[{index}].when.scope", trigger.when.scope


def _has_label(ref: FeatureRef, served: Served) -> bool:
    try:
        sae = served.feature(ref, "feature")
    except (InvalidRequest, UnknownName):
        return True
    return bool(sae.catalogue.feature(ref.feature).label)
