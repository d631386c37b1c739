"""Edits of features and references to features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from saeguard.v1 import generation_service_pb2 as generation_pb
from saeguard.v1 import intervention_pb2 as pb
from saeguard_sae.edits import KINDS, Edit, Unit
from saeguard_server.edge.wire.fields import at, at_most, chosen
from saeguard_server.errors import InvalidRequest
from saeguard_server.interventions import FeatureRef, Intervention, Phase, Scope

T = TypeVar("T")

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


def interventions(messages: Sequence[pb.Intervention], limit: int) -> tuple[Intervention, ...]:
    """The edits of a request.

    Raises:
        InvalidRequest: more than ``limit``, or one is malformed; ``interventions[i]...`` is named.
    """
    at_most(limit, messages, "interventions")
    return tuple(_intervention(one, f"interventions[{index}]") for index, one in enumerate(messages))


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


def _intervention(message: pb.Intervention, path: str) -> Intervention:
    with at(path):
        target = FeatureRef(message.sae, message.feature)
    kind = chosen(message, "kind", f"{path}.kind")
    edit = _edit(kind, getattr(message, kind), f"{path}.{kind}")
    return Intervention(target, edit, _scope(message.scope, f"{path}.scope"))


def _edit(kind: str, body: Message, path: str) -> Edit:
    # The wire's kinds and the domain's have the same names and fields; a test compares them.
    values: dict[str, Any] = {field.name: getattr(body, field.name) for field in body.DESCRIPTOR.fields}
    if "unit" in values:
        values["unit"] = _named(UNITS, values["unit"], f"{path}.unit")
    with at(path):
        return KINDS[kind](**values)


def _scope(message: pb.Scope, path: str) -> Scope:
    phase = _named(PHASES, message.phase, f"{path}.phase")
    with at(path):
        return Scope(
            phase=phase,
            start=message.start,
            end=message.end if message.HasField("end") else None,
            include_special_tokens=message.include_special_tokens,
        )


def _named(names: Mapping[int, T], number: int, path: str) -> T:
    if number not in names:
        raise InvalidRequest(path, f"{number} is not a value of this enum; this server may be older than its caller")
    return names[number]
