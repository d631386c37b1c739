"""Whether a set of policies can be enforced on what is served: every problem is listed, not just the first.

Rules and triggers are prepared as for a request, so that what passes here cannot be refused later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import combinations

from saeguard_server.errors import InvalidRequest, UnknownName
from saeguard_server.guard.policy import lint
from saeguard_server.guard.policy.combining import Clash, clash_of, combine
from saeguard_server.guard.policy.findings import Finding
from saeguard_server.guard.policy.model import Policy, Target
from saeguard_server.guard.policy.prepared import (
    ReadyEdit,
    ReadyPolicy,
    applied,
    prepare,
    wanted_rules,
    wanted_triggers,
)
from saeguard_server.guard.policy.served import Served
from saeguard_server.interventions import Condition, FeatureRef, Wanted

LISTED = 20
"""Problems in one message; what there are more is counted."""


class CannotServe(ValueError):
    """Policies that cannot be enforced here; ``problems`` lists why."""

    def __init__(self, problems: Sequence[Finding]) -> None:
        said = [str(one) for one in problems[:LISTED]]
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        super().__init__("; ".join(said + more))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Report:
    """What was found of a set of policies."""

    problems: tuple[Finding, ...]
    """Why it cannot be enforced here."""
    warnings: tuple[Finding, ...]
    """What is odd, and can be enforced all the same."""


def check(policies: Sequence[Policy], served: Served, now: datetime) -> Report:
    """Everything that is wrong with a set of policies, and everything that is odd.

    A policy for other models is not checked against this one. ``now`` has a time zone.
    """
    here = [policy for policy in policies if is_for(policy, served)]
    problems = [problem for policy in here for problem in _problems(policy, served)]
    broken = {problem.policy for problem in problems}
    sound = [prepare(policy, served) for policy in here if policy.name not in broken]
    problems += _clashes(sound, "enforce")
    warnings = [warning for policy in policies for warning in lint.warnings(policy, served, now)]
    warnings += _clashes(sound, "shadow")
    return Report(tuple(problems), tuple(warnings))


def check_or_refuse(policies: Sequence[Policy], served: Served, now: datetime) -> tuple[str, ...]:
    """What is odd about policies that can be enforced here.

    Raises:
        InvalidRequest: they cannot; every problem is listed.
    """
    report = check(policies, served, now)
    if report.problems:
        raise InvalidRequest("policies", str(CannotServe(report.problems)))
    return tuple(map(str, report.warnings))


def ready(policies: Sequence[Policy], served: Served, now: datetime) -> dict[str, ReadyPolicy]:
    """Those that can act on this model, prepared, in order: none that is off, nor one that has expired and is broken.

    Raises:
        CannotServe: one cannot be enforced here as it is written, or two cannot be kept together.
    """
    found: dict[str, ReadyPolicy] = {}
    problems: list[Finding] = []
    for policy in policies:
        if policy.mode == "off" or not is_for(policy, served):
            continue
        wrong = list(_problems(policy, served))
        if not wrong:
            found[policy.name] = prepare(policy, served)
        elif policy.expires is None or policy.expires > now:
            problems += wrong
    problems += _clashes(list(found.values()), "enforce")
    if problems:
        raise CannotServe(problems)
    return found


def is_for(policy: Policy, served: Served) -> bool:
    """Whether it may act on this model."""
    return not policy.target.models or served.model_name in policy.target.models


def _problems(policy: Policy, served: Served) -> Iterator[Finding]:
    """A policy's own; of one field the first."""
    seen: set[str] = set()
    for attempt in _attempts(policy, served):
        try:
            attempt()
        except (InvalidRequest, UnknownName) as err:
            if err.field not in seen:
                seen.add(err.field)
                yield Finding(policy.name, err.field, err.description)


def _attempts(policy: Policy, served: Served) -> Iterator[Callable[[], object]]:
    """Everything that is looked for in what is served: parts first, so that one problem does not hide another."""
    for wanted in wanted_rules(policy):
        one = wanted.intervention
        if one.when is not None:
            yield from _features(one.when, f"{wanted.field}.when", served)
            yield partial(served.edit, replace(wanted, intervention=replace(one, when=None)))
        yield partial(served.edit, wanted)
    for trigger in wanted_triggers(policy):
        yield from _features(trigger.trigger.when, f"{trigger.field}.when", served)
        for index, edit in enumerate(applied(trigger.trigger)):
            part = Wanted(intervention=edit, field=f"{trigger.field}.apply.interventions[{index}]")
            yield partial(served.edit, part)
        yield partial(served.trigger, trigger)
    yield from _names(policy, served)
    yield from (partial(look, policy, served) for look in (_check_pins, _check_kept, _check_own_edits))


def _features(when: Condition, field: str, served: Served) -> Iterator[Callable[[], object]]:
    for index, term in enumerate(when.terms):
        yield partial(served.feature, term.feature, f"{field}.terms[{index}]")


def _names(policy: Policy, served: Served) -> Iterator[Callable[[], object]]:
    """A name in limits that nobody knows would silently limit nothing."""
    limits = policy.limits
    lists: tuple[tuple[str, Iterable[str | FeatureRef]], ...] = (
        ("allowed_saes", limits.allowed_saes or ()),
        ("denied_saes", limits.denied_saes),
        ("allowed_features", limits.allowed_features or ()),
        ("denied_features", limits.denied_features),
    )
    for name, listed in lists:
        for index, one in enumerate(listed):
            field = f"limits.{name}[{index}]"
            yield partial(served.sae, one, field) if isinstance(one, str) else partial(served.feature, one, field)
    for name, _ in policy.pins.saes:
        yield partial(served.sae, name, f"pins.saes.{name}")


def _check_pins(policy: Policy, served: Served) -> None:
    if policy.pins.model not in (None, served.model_digest):
        raise InvalidRequest("pins.model", f"the served model has {served.model_digest}, got {policy.pins.model}")
    for name, digest in policy.pins.saes:
        field = f"pins.saes.{name}"
        has = served.sae(name, field).digest
        if has != digest:
            raise InvalidRequest(field, f"the served SAE has {has}, got {digest}")


def _check_kept(policy: Policy, served: Served) -> None:
    """What this server cannot do must not be promised."""
    if policy.requires_audit and not served.keeps_audit:
        raise InvalidRequest("requires_audit", "this server keeps no audit")
    if policy.counterfactual_share and not served.compares:
        raise InvalidRequest("counterfactual_share", "this server does not run requests without their policies")


def _check_own_edits(policy: Policy, served: Served) -> None:
    """Rules and triggers of one policy on one feature, whatever the mode: it could not be enforced."""
    try:
        found = prepare(policy, served)
        combine(found.edits, found.triggers, served)
    except Clash as err:
        field = err.other.wanted.field
        raise InvalidRequest(field, str(err)) from err


def _clashes(policies: Sequence[ReadyPolicy], mode: str) -> Iterator[Finding]:
    """Pairs of policies that cannot both be enforced on a request; shadows as if they were enforced."""
    on_feature: dict[FeatureRef, list[tuple[Policy, ReadyEdit]]] = {}
    for one in policies:
        if one.policy.mode != "off":
            for edit in (*one.edits, *(edit for trigger in one.triggers for edit in trigger.edits)):
                on_feature.setdefault(edit.target, []).append((one.policy, edit))
    for rules in on_feature.values():
        for (policy, edit), (other, other_edit) in combinations(rules, 2):
            strongest = "shadow" if "shadow" in (policy.mode, other.mode) else "enforce"
            if policy is other or strongest != mode or not may_meet(policy.target, other.target):
                continue
            if clash := clash_of(edit, other_edit):
                said = f"{clash}, and both may be on one request"
                yield Finding(
                    other.name, other_edit.wanted.field, said + ("" if mode == "enforce" else " once enforced")
                )


def may_meet(one: Target, other: Target) -> bool:
    """Whether a request can be aimed at by both; a caller may have any tags."""
    lists = ((one.callers, other.callers), (one.models, other.models))
    return all(not a or not b or not set(a).isdisjoint(b) for a, b in lists)
