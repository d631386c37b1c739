"""From what is written down to the nouns of ``model``; whatever is wrong is named by its path in the document."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from saeguard_sae.edits import KINDS, Edit
from saeguard_server.guard.policy.model import Limits, Pins, Policy, Rollout, Rule, Target
from saeguard_server.guard.policy.probe import LinearProbe
from saeguard_server.guard.policy.shapes import (
    ConditionShape,
    EditShape,
    FeatureShape,
    LimitsShape,
    OverShape,
    PolicyShape,
    RuleShape,
    ScopeShape,
    TermShape,
    TriggerShape,
    ValueShape,
)
from saeguard_server.interventions import (
    COMPARISONS,
    Action,
    Apply,
    Comparison,
    Condition,
    FeatureRef,
    Flag,
    Intervention,
    Scope,
    Stop,
    Term,
    Trigger,
    Window,
)

ProbeReader: TypeAlias = Callable[[str], LinearProbe]
"""The probe in a file of that name. Raises ValueError."""

_FIELD = re.compile(r"[a-z_]+(\[\d+\])?(\.[a-z_]+(\[\d+\])?)*")


def no_probes(name: str) -> LinearProbe:
    """Where there are no files."""
    raise ValueError("files of probes are only read where the policy is read from files")


def policy(shape: PolicyShape, probes: ProbeReader = no_probes) -> Policy:
    """The policy that a document describes.

    Raises:
        ValueError: it describes none; the message begins with the path of what is wrong.
    """
    rules = tuple(_rule(one, f"rules[{index}]", probes) for index, one in enumerate(shape.rules))
    triggers = tuple(_trigger(one, f"triggers[{index}]", probes) for index, one in enumerate(shape.triggers))
    limits = Limits() if shape.limits is None else _limits(shape.limits)
    with _at("rollout"):
        rollout = Rollout() if shape.rollout is None else Rollout(share=shape.rollout.share, by=shape.rollout.by)
    target, pins = shape.target, shape.pins
    with _at(""):
        return Policy(
            name=shape.name,
            mode=shape.mode,
            description=shape.description,
            owner=shape.owner,
            target=(
                Target() if target is None else Target(callers=target.callers, tags=target.tags, models=target.models)
            ),
            rollout=rollout,
            rules=rules,
            triggers=triggers,
            limits=limits,
            pins=Pins() if pins is None else Pins(model=pins.model, saes=tuple(sorted(pins.saes.items()))),
            expires=shape.expires,
            counterfactual_share=shape.counterfactual_share,
            requires_audit=shape.requires_audit,
        )


def _rule(shape: RuleShape, path: str, probes: ProbeReader) -> Rule:
    when = None if shape.when is None else _condition(shape.when, f"{path}.when", probes)
    edited = _intervention(shape, path, when)
    with _at(path):
        return Rule(shape.name, edited)


def _trigger(shape: TriggerShape, path: str, probes: ProbeReader) -> Trigger:
    when = _condition(shape.when, f"{path}.when", probes)
    action = _action(shape, path)
    with _at(path):
        return Trigger(shape.name, when, action)


def _action(shape: TriggerShape, path: str) -> Action:
    if shape.apply is not None and shape.flag is shape.stop is None:
        edits = [_intervention(one, f"{path}.apply[{index}]", None) for index, one in enumerate(shape.apply)]
        if not edits:
            raise ValueError(f"{path}.apply: must not be empty")
        return Apply(tuple(edits))
    if shape.apply is None and (shape.flag is None) != (shape.stop is None):
        return Stop() if _is_said(shape.stop, f"{path}.stop", shape.flag, f"{path}.flag") else Flag()
    raise ValueError(f"{path}: must have one of flag, stop and apply")


def _is_said(first: bool | None, first_path: str, other: bool | None, other_path: str) -> bool:
    """Which of two is there, of which the one that is there must be true."""
    if first is False or other is False:
        raise ValueError(f"{first_path if first is False else other_path}: must be true, or left out")
    return first is True


def _intervention(shape: EditShape, path: str, when: Condition | None) -> Intervention:
    edit = _edit(shape, path)
    scope = _scope(shape.scope, f"{path}.scope")
    with _at(path):
        return Intervention(FeatureRef(shape.sae, shape.feature), edit, scope, when)


def _edit(shape: EditShape, path: str) -> Edit:
    given = [kind for kind in KINDS if getattr(shape, kind) is not None]
    if len(given) != 1:
        raise ValueError(f"{path}: must have one of {', '.join(KINDS)}{', not ' if given else ''}{' and '.join(given)}")
    kind = given[0]
    said = getattr(shape, kind)
    if said is False:
        raise ValueError(f"{path}.{kind}: must be true, or left out")
    make: Callable[..., Edit] = KINDS[kind]
    with _at(f"{path}.{kind}"):
        match said:
            case True:
                return make()
            case ValueShape():
                return make(value=said.value, unit=said.unit)
            case number:
                return make(number)


def _scope(shape: ScopeShape | None, path: str) -> Scope:
    if shape is None:
        return Scope()
    with _at(path):
        return Scope(shape.phase, shape.start, shape.end, shape.include_special_tokens)


def _condition(shape: ConditionShape, path: str, probes: ProbeReader) -> Condition:
    terms, bias = _probe(shape, path, probes)
    comparison, threshold = _comparison(shape, path)
    window = _window(shape.over, f"{path}.over")
    scope = _scope(shape.scope, f"{path}.scope")
    with _at(path, {"threshold": comparison}):
        return Condition(
            terms=terms,
            threshold=threshold,
            comparison=comparison,
            bias=bias,
            release=shape.release,
            unit=shape.unit,
            window=window,
            scope=scope,
        )


def _probe(shape: ConditionShape, path: str, probes: ProbeReader) -> tuple[tuple[Term, ...], float]:
    is_one = shape.sae is not None or shape.feature is not None
    if is_one + (shape.terms is not None) + (shape.probe is not None) != 1:
        raise ValueError(f"{path}: must have sae and feature, or terms, or probe")
    bias = 0.0 if shape.bias is None else shape.bias
    if shape.probe is not None:
        if shape.bias is not None:
            raise ValueError(f"{path}.bias: is the probe's")
        with _at(f"{path}.probe"):
            found = probes(shape.probe)
        return found.terms, found.bias
    if shape.terms is not None:
        return tuple(_term(one, f"{path}.terms[{index}]") for index, one in enumerate(shape.terms)), bias
    if shape.sae is None or shape.feature is None:
        raise ValueError(f"{path}.{'sae' if shape.sae is None else 'feature'}: must be set")
    return (_term(TermShape(sae=shape.sae, feature=shape.feature), path),), bias


def _term(shape: TermShape, path: str) -> Term:
    with _at(path):
        return Term(FeatureRef(shape.sae, shape.feature), shape.weight)


def _comparison(shape: ConditionShape, path: str) -> tuple[Comparison, float]:
    given = [(name, getattr(shape, name)) for name in COMPARISONS if getattr(shape, name) is not None]
    if len(given) != 1:
        raise ValueError(f"{path}: must have one of {', '.join(COMPARISONS)}")
    return given[0]


def _window(shape: str | OverShape, path: str) -> Window:
    with _at(path, {"tokens": "rolling_mean"}):
        match shape:
            case "this_token" | "any_so_far" | "maximum":
                return Window(shape)
            case OverShape(rolling_mean=int(tokens), k=None, of=None):
                return Window("rolling_mean", tokens)
    with _at(path, {"tokens": "of"}):
        match shape:
            case OverShape(rolling_mean=None, k=int(k), of=int(tokens)):
                return Window("k_of_n", tokens, k)
    raise ValueError(f"{path}: must be this_token, any_so_far, maximum, or have rolling_mean, or k and of")


def _limits(shape: LimitsShape) -> Limits:
    allowed = shape.allowed_features
    found = None if allowed is None else _features(allowed, "limits.allowed_features")
    denied = _features(shape.denied_features, "limits.denied_features")
    with _at("limits"):
        return Limits(
            max_relative_edit=shape.max_relative_edit,
            allowed_saes=shape.allowed_saes,
            denied_saes=shape.denied_saes,
            allowed_features=found,
            denied_features=denied,
        )


def _features(shapes: tuple[FeatureShape, ...], path: str) -> tuple[FeatureRef, ...]:
    found = []
    for index, one in enumerate(shapes):
        with _at(f"{path}[{index}]"):
            found.append(FeatureRef(one.sae, one.feature))
    return tuple(found)


@contextmanager
def _at(path: str, renamed: dict[str, str] | None = None) -> Iterator[None]:
    """Puts a path before the field that a domain class's ``ValueError("field: problem")`` names."""
    try:
        yield
    except ValueError as err:
        field, _, problem = str(err).partition(": ")
        if not problem or not _FIELD.fullmatch(field):
            raise ValueError(f"{path}: {err}") from err
        named = (renamed or {}).get(field, field)
        raise ValueError(f"{f'{path}.{named}'.lstrip('.')}: {problem}") from err
