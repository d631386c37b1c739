"""Properties of the wire: domain to message to domain is identity, and no bytes whatever reach INTERNAL."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from saeguard.v1 import activation_service_pb2 as activation_pb
from saeguard.v1 import condition_pb2
from saeguard.v1 import generation_service_pb2 as pb
from saeguard.v1 import intervention_pb2 as edit_pb
from saeguard_server import interventions, request
from saeguard_server.errors import InvalidRequest
from saeguard_server.rpc.wire import interventions as wire
from saeguard_server.rpc.wire.activations import activation_request
from saeguard_server.rpc.wire.generation import generation_request
from support.strategies import LIMITS, generations, readings


def to_input(message: Any, one: request.ModelInput) -> None:
    if isinstance(one, request.TextInput):
        message.text = one.text
    elif isinstance(one, request.TokenInput):
        message.tokens.ids.extend(one.ids)
    else:
        for turn in one.messages:
            message.chat.messages.add(role=turn.role, content=turn.content)


def backwards(names: Any) -> dict[Any, int]:
    return {name: number for number, name in names.items()}


def to_scope(scope: interventions.Scope) -> edit_pb.Scope:
    return edit_pb.Scope(
        phase=backwards(wire.PHASES)[scope.phase], start=scope.start, end=scope.end,
        include_special_tokens=scope.include_special_tokens,
    )  # fmt: skip


def to_condition(one: interventions.Condition) -> edit_pb.Condition:
    window = one.window
    return edit_pb.Condition(
        terms=[
            edit_pb.Term(sae=term.feature.sae, feature=term.feature.feature, weight=term.weight) for term in one.terms
        ],
        bias=one.bias,
        comparison=backwards(wire.COMPARISONS)[one.comparison],
        threshold=one.threshold,
        release=one.release,
        unit=backwards(wire.UNITS)[one.unit],
        window=edit_pb.Window(kind=backwards(wire.WINDOWS)[window.kind], tokens=window.tokens, k=window.k),
        scope=to_scope(one.scope),
    )


def to_edits(message: Any, edits: tuple[interventions.Intervention, ...]) -> None:
    for one in edits:
        said = message.interventions.add(sae=one.target.sae, feature=one.target.feature)
        body = {field.name: getattr(one.edit, field.name) for field in fields(one.edit)}
        if "unit" in body:
            body["unit"] = backwards(wire.UNITS)[body["unit"]]
        getattr(said, one.edit.kind).CopyFrom(type(getattr(said, one.edit.kind))(**body))
        said.scope.CopyFrom(to_scope(one.scope))
        if one.when is not None:
            said.when.CopyFrom(to_condition(one.when))


def to_trigger(one: interventions.Trigger) -> condition_pb2.Trigger:
    message = condition_pb2.Trigger(name=one.name, when=to_condition(one.when))
    if isinstance(one.action, interventions.Apply):
        to_edits(message.apply, one.action.interventions)
    else:
        getattr(message, type(one.action).__name__.lower()).SetInParent()
    return message


def to_sampling(one: request.Sampling) -> pb.Sampling:
    return pb.Sampling(**{field.name: getattr(one, field.name) for field in fields(one)})


def to_refs(refs: tuple[interventions.FeatureRef, ...]) -> list[pb.FeatureRef]:
    return [pb.FeatureRef(sae=ref.sae, feature=ref.feature) for ref in refs]


def to_generation(one: request.GenerationRequest) -> pb.GenerateRequest:
    message = pb.GenerateRequest(max_relative_edit=one.max_relative_edit)
    to_input(message, one.prompt)
    to_edits(message, one.interventions)
    message.sampling.CopyFrom(to_sampling(one.sampling))
    message.watch.extend(to_refs(one.watch))
    message.triggers.extend(to_trigger(trigger) for trigger in one.triggers)
    message.policies.extend(one.policies)
    message.conversation = one.conversation
    if one.min_policy_activation is not None:
        message.min_policy_activation = one.min_policy_activation
    return message


def to_reading(one: request.ActivationRequest) -> activation_pb.GetActivationsRequest:
    message = activation_pb.GetActivationsRequest(saes=one.saes)
    for given_input in one.inputs:
        to_input(message.inputs.add(), given_input)
    to_edits(message, one.interventions)
    if isinstance(one.selection, request.TopK):
        message.top_k = one.selection.k
    elif isinstance(one.selection, request.Threshold):
        message.threshold = one.selection.value
    else:
        message.features.features.extend(to_refs(one.selection.features))
    return message


@given(generations)
def test_a_generation_means_the_same_after_the_wire(asked: request.GenerationRequest) -> None:
    message = pb.GenerateRequest.FromString(to_generation(asked).SerializeToString())
    assert generation_request(message, LIMITS) == asked


@given(readings)
def test_a_reading_means_the_same_after_the_wire(asked: request.ActivationRequest) -> None:
    message = activation_pb.GetActivationsRequest.FromString(to_reading(asked).SerializeToString())
    assert activation_request(message, LIMITS) == asked


@given(generations, st.data())
def test_a_damaged_generation_is_read_or_refused(asked: request.GenerationRequest, data: st.DataObject) -> None:
    raw = bytearray(to_generation(asked).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        generation_request(pb.GenerateRequest.FromString(bytes(raw)), LIMITS)
    except DecodeError:
        return
    except InvalidRequest as err:
        refused = err
    else:
        return
    assert refused.field
    assert refused.description


VALID = pb.GenerateRequest(text="x", sampling=pb.Sampling(top_p=0.5, stop=["y"]), watch=[pb.FeatureRef(sae="mid")])


def garbage(count: int) -> Iterator[bytes]:
    """Invalid UTF-8, a length beyond the end, random bytes, and a valid message with bytes changed."""
    yield from (b"\x0a\x02\xff\xfe", b"\xff" * 30, b"\x0a\xff\xff\xff\xff\x0f", b"")
    dice = random.Random(7)
    for _ in range(count):
        yield dice.randbytes(dice.randint(1, 60))
        raw = bytearray(VALID.SerializeToString())
        for _ in range(dice.randint(1, 4)):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        yield bytes(raw)


@pytest.mark.parametrize(
    "method", ["GenerationService/Generate", "ActivationService/GetActivations", "CatalogService/ListFeatures"]
)
async def test_no_bytes_reach_internal(running: Any, method: str) -> None:
    seen: set[grpc.StatusCode] = set()
    send = running.channel.unary_stream(f"/saeguard.v1.{method}")
    for raw in garbage(100):
        try:
            async for _ in send(raw, timeout=2):
                pass
        except grpc.aio.AioRpcError as err:
            seen.add(err.code())
    assert grpc.StatusCode.INVALID_ARGUMENT in seen
    # DEADLINE_EXCEEDED: a damaged max_new_tokens can be huge.
    assert seen <= {
        grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DEADLINE_EXCEEDED,
    }  # fmt: skip
