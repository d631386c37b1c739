"""Edits of features and references to features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from saeguard.v1 import generation_service_pb2 as generation_pb
from saeguard.v1 import intervention_pb2 as pb
from saeguard_sae.edits import KINDS, Edit, Unit
from saeguard_server.interventions import (
    MAX_TERMS,
    Comparison,
    Condition,
    FeatureRef,
    Intervention,
    Phase,
    Scope,
    Term,
    Window,
    WindowKind,
)
from saeguard_server.rpc.wire.fields import at, at_most, chosen, named

UNITS: Mapping[int, Unit] = {
    pb.UNIT_UNSPECIFIED: "raw",
    pb.UNIT_RAW: "raw",
    pb.UNIT_MAX: "max",
    pb.UNIT_UNIT_DECODER: "unit_decoder",
}
PHASES: Mapping[int, Phase] = {
    pb.PHASE_UNSPECIFIED: "all",
    pb.PHASE_ALL: "all",
    pb.PHASE_PROMPT: "prompt",
    pb.PHASE_GENERATED: "generated",
}
COMPARISONS: Mapping[int, Comparison] = {
    pb.COMPARISON_UNSPECIFIED: "above",
    pb.COMPARISON_ABOVE: "above",
    pb.COMPARISON_AT_LEAST: "at_least",
    pb.COMPARISON_BELOW: "below",
    pb.COMPARISON_AT_MOST: "at_most",
}
WINDOWS: Mapping[int, WindowKind] = {
    pb.WINDOW_KIND_UNSPECIFIED: "this_token",
    pb.WINDOW_KIND_THIS_TOKEN: "this_token",
    pb.WINDOW_KIND_ANY_SO_FAR: "any_so_far",
    pb.WINDOW_KIND_MAXIMUM: "maximum",
    pb.WINDOW_KIND_ROLLING_MEAN: "rolling_mean",
    pb.WINDOW_KIND_K_OF_N: "k_of_n",
}


def interventions(
    messages: Sequence[pb.Intervention], limit: int, path: str = "interventions"
) -> tuple[Intervention, ...]:
    """The edits of a request.

    Raises:
        InvalidRequest: more than ``limit``, or one is malformed; ``interventions[i]...`` is named.
    """
    at_most(limit, messages, path)
    return tuple(intervention(one, f"{path}[{index}]") for index, one in enumerate(messages))


def condition(message: pb.Condition, path: str) -> Condition:
    """When an edit or trigger acts.

    Raises:
        InvalidRequest: names the field.
    """
    at_most(MAX_TERMS, message.terms, f"{path}.terms")
    terms = tuple(_term(one, f"{path}.terms[{index}]") for index, one in enumerate(message.terms))
    comparison = named(COMPARISONS, message.comparison, f"{path}.comparison")
    unit = named(UNITS, message.unit, f"{path}.unit")
    window, scope = _window(message.window, f"{path}.window"), _scope(message.scope, f"{path}.scope")
    with at(path):
        return Condition(
            terms=terms,
            bias=message.bias,
            comparison=comparison,
            threshold=message.threshold,
            release=message.release if message.HasField("release") else None,
            unit=unit,
            window=window,
            scope=scope,
        )


def feature_refs(messages: Iterable[generation_pb.FeatureRef], path: str) -> tuple[FeatureRef, ...]:
    """References to features, in order.

    Raises:
        InvalidRequest: one names no SAE.
    """
    found = []
    for index, one in enumerate(messages):
        with at(f"{path}[{index}]"):
            found.append(FeatureRef(one.sae, one.feature))
    return tuple(found)


def intervention(message: pb.Intervention, path: str) -> Intervention:
    """One edit.

    Raises:
        InvalidRequest: names the field.
    """
    with at(path):
        target = FeatureRef(message.sae, message.feature)
    kind = chosen(message, "kind", f"{path}.kind")
    edit = _edit(kind, getattr(message, kind), f"{path}.{kind}")
    when = condition(message.when, f"{path}.when") if message.HasField("when") else None
    return Intervention(target, edit, _scope(message.scope, f"{path}.scope"), when)


def _term(message: pb.Term, path: str) -> Term:
    with at(path):
        return Term(FeatureRef(message.sae, message.feature), message.weight if message.HasField("weight") else 1.0)


def _window(message: pb.Window, path: str) -> Window:
    kind = named(WINDOWS, message.kind, f"{path}.kind")
    with at(path):
        return Window(
            kind=kind,
            tokens=message.tokens if message.HasField("tokens") else 1,
            k=message.k if message.HasField("k") else 1,
        )


def _edit(kind: str, body: Message, path: str) -> Edit:
    # The wire's kinds and the domain's have the same names and fields; a test compares them.
    values: dict[str, Any] = {field.name: getattr(body, field.name) for field in body.DESCRIPTOR.fields}
    if "unit" in values:
        values["unit"] = named(UNITS, values["unit"], f"{path}.unit")
    with at(path):
        return KINDS[kind](**values)


def _scope(message: pb.Scope, path: str) -> Scope:
    phase = named(PHASES, message.phase, f"{path}.phase")
    with at(path):
        return Scope(
            phase=phase,
            start=message.start,
            end=message.end if message.HasField("end") else None,
            include_special_tokens=message.include_special_tokens,
        )
