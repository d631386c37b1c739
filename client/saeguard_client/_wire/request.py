"""Values that several requests hold: inputs, edits, feature addresses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from saeguard.v1 import condition_pb2, generation_service_pb2, input_pb2, intervention_pb2
from saeguard_client import _checks
from saeguard_client.catalog import FeatureRef
from saeguard_client.conditions import Condition, Term, Window
from saeguard_client.inputs import ChatMessage
from saeguard_client.interventions import Intervention
from saeguard_client.scopes import Scope
from saeguard_client.triggers import Apply, Trigger

_TARGET = ("sae", "feature", "scope", "when")


def prompt(name: str, value: object) -> dict[str, Any]:
    """The one field of the wire's ``input`` that ``value`` is for.

    Raises:
        ValueError: neither text, nor chat messages, nor token ids.
    """
    if isinstance(value, str):
        return {"text": _checks.text(name, value)}
    items = list(iterable(name, value))
    if not items:
        raise ValueError(f"{name}: must not be empty")
    if isinstance(items[0], ChatMessage | Mapping):
        return {"chat": input_pb2.ChatInput(messages=[_message(name, i, item) for i, item in enumerate(items)])}
    return {"tokens": input_pb2.TokenInput(ids=[_checks.whole(f"{name}[{i}]", item) for i, item in enumerate(items)])}


def interventions(name: str, edits: Iterable[Intervention]) -> list[intervention_pb2.Intervention]:
    """Raises ValueError for anything that is not an edit."""
    return [_intervention(f"{name}[{i}]", edit) for i, edit in enumerate(iterable(name, edits))]


def triggers(name: str, given: Iterable[Trigger]) -> list[condition_pb2.Trigger]:
    """Raises ValueError for anything that is not a Trigger."""
    return [_trigger(f"{name}[{i}]", trigger) for i, trigger in enumerate(iterable(name, given))]


def features(name: str, refs: Iterable[FeatureRef]) -> list[generation_service_pb2.FeatureRef]:
    """Raises ValueError for anything that is not a FeatureRef."""
    return [_feature(f"{name}[{i}]", ref) for i, ref in enumerate(iterable(name, refs))]


def iterable(name: str, value: object) -> Iterable[Any]:
    """Raises ValueError for what only looks like a sequence of arguments: a string, a mapping, a single value."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name}: must be a sequence, got {value!r}")
    return value


def _intervention(name: str, edit: object) -> intervention_pb2.Intervention:
    if not isinstance(edit, Intervention) or not edit.kind:
        raise ValueError(f"{name}: must be an edit such as Zero or Clamp, got {edit!r}")
    message = intervention_pb2.Intervention(sae=edit.sae, feature=edit.feature, scope=_scope(edit.scope))
    if edit.when is not None:
        message.when.CopyFrom(_condition(edit.when))
    body = getattr(message, edit.kind)
    body.SetInParent()
    for field in fields(edit):
        if field.name not in _TARGET:
            setattr(body, field.name, _operand(field.name, getattr(edit, field.name)))
    return message


def _trigger(name: str, trigger: object) -> condition_pb2.Trigger:
    if not isinstance(trigger, Trigger):
        raise ValueError(f"{name}: must be a Trigger, got {trigger!r}")
    message = condition_pb2.Trigger(name=trigger.name, when=_condition(trigger.when))
    if isinstance(trigger.action, Apply):
        edits = interventions(f"{name}.action.interventions", trigger.action.interventions)
        message.apply.interventions.extend(edits)
    else:
        getattr(message, type(trigger.action).__name__.lower()).SetInParent()
    return message


def _condition(when: Condition) -> intervention_pb2.Condition:
    return intervention_pb2.Condition(
        terms=[_term(one) for one in when.terms],
        bias=when.bias,
        comparison=intervention_pb2.Comparison.Value(f"COMPARISON_{when.comparison.upper()}"),
        threshold=when.threshold,
        release=when.release,
        unit=_operand("unit", when.unit),
        window=_window(when.window),
        scope=_scope(when.scope),
    )


def _term(term: Term) -> intervention_pb2.Term:
    return intervention_pb2.Term(sae=term.sae, feature=term.feature, weight=term.weight)


def _window(window: Window) -> intervention_pb2.Window:
    kind = intervention_pb2.WindowKind.Value(f"WINDOW_KIND_{window.kind.upper()}")
    return intervention_pb2.Window(kind=kind, tokens=window.tokens, k=window.k)


def _operand(name: str, value: Any) -> Any:
    return intervention_pb2.Unit.Value(f"UNIT_{value.upper()}") if name == "unit" else value


def _scope(scope: Scope | None) -> intervention_pb2.Scope | None:
    if scope is None:
        return None
    return intervention_pb2.Scope(
        phase=intervention_pb2.Phase.Value(f"PHASE_{scope.phase.upper()}"),
        start=scope.start,
        end=scope.end,
        include_special_tokens=scope.include_special_tokens,
    )


def _feature(name: str, ref: object) -> generation_service_pb2.FeatureRef:
    if not isinstance(ref, FeatureRef):
        raise ValueError(f"{name}: must be a FeatureRef, got {ref!r}")
    return generation_service_pb2.FeatureRef(sae=ref.sae, feature=ref.feature)


def _message(name: str, index: int, item: object) -> input_pb2.ChatMessage:
    try:
        message = ChatMessage.of(item)
    except ValueError as err:
        raise ValueError(f"{name}[{index}]: {err}") from None
    return input_pb2.ChatMessage(role=message.role, content=message.content)
