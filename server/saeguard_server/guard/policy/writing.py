"""From the nouns of ``model`` to what is written down: the one form of each policy, with nothing that goes unsaid."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from saeguard_sae.edits import Edit, Scale, Zero
from saeguard_server.guard.policy.model import Limits, Pins, Policy, Rollout, Rule, Target
from saeguard_server.guard.policy.shapes import (
    ConditionShape,
    EditShape,
    FeatureShape,
    LimitsShape,
    OverShape,
    PinsShape,
    PolicyShape,
    RolloutShape,
    RuleShape,
    ScopeShape,
    TargetShape,
    TermShape,
    TriggerShape,
    Valued,
    ValueShape,
)
from saeguard_server.interventions import Apply, Condition, FeatureRef, Flag, Intervention, Scope, Stop, Trigger, Window


def shape(policy: Policy) -> PolicyShape:
    """How a policy is written down; equal policies alike."""
    target, rollout, pins = policy.target, policy.rollout, policy.pins
    return PolicyShape(
        name=policy.name,
        mode=policy.mode,
        description=policy.description,
        owner=policy.owner,
        target=(
            None if target == Target() else TargetShape(callers=target.callers, tags=target.tags, models=target.models)
        ),
        rollout=None if rollout == Rollout() else RolloutShape(share=float(rollout.share), by=rollout.by),
        rules=tuple(map(_rule, policy.rules)),
        triggers=tuple(map(_trigger, policy.triggers)),
        limits=None if policy.limits == Limits() else _limits(policy.limits),
        pins=None if pins == Pins() else PinsShape(model=pins.model, saes=dict(pins.saes)),
        expires=None if policy.expires is None else policy.expires.astimezone(UTC),
        counterfactual_share=float(policy.counterfactual_share),
        requires_audit=policy.requires_audit,
    )


def _rule(rule: Rule) -> RuleShape:
    one = rule.intervention
    return RuleShape(name=rule.name, when=None if one.when is None else _condition(one.when), **_edited(one))


def _trigger(trigger: Trigger) -> TriggerShape:
    action = trigger.action
    return TriggerShape(
        name=trigger.name,
        when=_condition(trigger.when),
        flag=True if isinstance(action, Flag) else None,
        stop=True if isinstance(action, Stop) else None,
        apply=tuple(EditShape(**_edited(one)) for one in action.interventions) if isinstance(action, Apply) else None,
    )


def _edited(one: Intervention) -> dict[str, Any]:
    return {
        "sae": one.target.sae,
        "feature": one.target.feature,
        one.edit.kind: _said(one.edit),
        "scope": _scope(one.scope),
    }


def _said(edit: Edit) -> bool | Valued:
    if isinstance(edit, Zero):
        return True
    if isinstance(edit, Scale):
        return float(edit.factor)
    return float(edit.value) if edit.unit == "raw" else ValueShape(value=float(edit.value), unit=edit.unit)


def _scope(scope: Scope) -> ScopeShape | None:
    if scope == Scope():
        return None
    return ScopeShape(
        phase=scope.phase,
        start=scope.start,
        end=scope.end,
        include_special_tokens=scope.include_special_tokens,
    )


def _condition(when: Condition) -> ConditionShape:
    said: dict[str, Any] = {**_terms(when), when.comparison: float(when.threshold)}
    return ConditionShape(
        **said,
        bias=float(when.bias) if when.bias else None,
        release=None if when.release is None else float(when.release),
        unit=when.unit,
        over=_over(when.window),
        scope=_scope(when.scope),
    )


def _terms(when: Condition) -> dict[str, Any]:
    first = when.terms[0]
    if len(when.terms) == 1 and first.weight == 1:
        return {"sae": first.feature.sae, "feature": first.feature.feature}
    terms = (
        TermShape(sae=one.feature.sae, feature=one.feature.feature, weight=float(one.weight)) for one in when.terms
    )
    return {"terms": tuple(terms)}


def _over(window: Window) -> Any:
    match window.kind:
        case "rolling_mean":
            return OverShape(rolling_mean=window.tokens)
        case "k_of_n":
            return OverShape(k=window.k, of=window.tokens)
        case other:
            return other


def _limits(limits: Limits) -> LimitsShape:
    allowed = limits.allowed_features
    return LimitsShape(
        max_relative_edit=None if limits.max_relative_edit is None else float(limits.max_relative_edit),
        allowed_saes=limits.allowed_saes,
        denied_saes=limits.denied_saes,
        allowed_features=None if allowed is None else _features(allowed),
        denied_features=_features(limits.denied_features),
    )


def _features(refs: tuple[FeatureRef, ...]) -> tuple[FeatureShape, ...]:
    return tuple(FeatureShape(sae=one.sae, feature=one.feature) for one in refs)
