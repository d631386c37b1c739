"""The wire and the domain cannot drift apart: names are compared, not remembered."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import pytest
from google.protobuf.descriptor import Descriptor

from saeguard.v1 import activation_service_pb2 as activation_pb
from saeguard.v1 import catalog_service_pb2 as catalog_pb
from saeguard.v1 import condition_pb2, input_pb2, receipt_pb2, server_info_service_pb2
from saeguard.v1 import generation_service_pb2 as pb
from saeguard.v1 import intervention_pb2 as edit_pb
from saeguard.v1.policy_service_pb2 import PolicyMode
from saeguard_sae import catalogue
from saeguard_sae.edits import KINDS, UNITS
from saeguard_server import catalog, reply, request
from saeguard_server import interventions as domain
from saeguard_server.engine.protocol import ModelInfo
from saeguard_server.policy.model import MODES
from saeguard_server.rpc.server import SERVICES
from saeguard_server.rpc.wire import generation, interventions


def names(message: Descriptor) -> set[str]:
    return {field.name for field in message.fields}


def test_every_wire_kind_has_an_edit_with_the_same_fields() -> None:
    wire = {one.name: one.message_type for one in edit_pb.Intervention.DESCRIPTOR.oneofs_by_name["kind"].fields}
    assert wire.keys() == KINDS.keys()
    for name, message in wire.items():
        assert names(message) == {one.name for one in fields(KINDS[name])}


def test_every_enum_value_has_a_meaning_and_every_meaning_a_value() -> None:
    assert interventions.UNITS.keys() == set(edit_pb.Unit.values())
    assert set(interventions.UNITS.values()) == set(UNITS)
    assert interventions.PHASES.keys() == set(edit_pb.Phase.values())
    assert set(interventions.PHASES.values()) == set(domain.PHASES)
    assert interventions.COMPARISONS.keys() == set(edit_pb.Comparison.values())
    assert set(interventions.COMPARISONS.values()) == set(domain.COMPARISONS)
    assert interventions.WINDOWS.keys() == set(edit_pb.WindowKind.values())
    assert set(interventions.WINDOWS.values()) == set(domain.WINDOWS)
    assert {name.removeprefix("POLICY_MODE_").lower() for name, _ in PolicyMode.items()} == {"unspecified", *MODES}
    assert set(generation.FINISH_REASONS) == set(get_args(reply.FinishReason))
    assert set(generation.FINISH_REASONS.values()) == set(pb.FinishReason.values()) - {pb.FINISH_REASON_UNSPECIFIED}


def test_every_action_of_a_trigger_is_known() -> None:
    oneof = condition_pb2.Trigger.DESCRIPTOR.oneofs_by_name["action"]
    assert {one.message_type.name for one in oneof.fields} == {one.__name__ for one in get_args(domain.Action)}


def test_every_input_is_the_same_oneof() -> None:
    wanted = {"text", "chat", "tokens"}
    for message in (pb.GenerateRequest, activation_pb.ActivationInput):
        assert {one.name for one in message.DESCRIPTOR.oneofs_by_name["input"].fields} == wanted


@pytest.mark.parametrize(
    ("message", "noun"),
    [
        (pb.Sampling, request.Sampling),
        (pb.FeatureRef, domain.FeatureRef),
        (pb.FeatureReading, reply.FeatureReading),
        (pb.TokenLogprob, reply.TokenLogprob),
        (pb.Timings, reply.Timings),
        (edit_pb.Scope, domain.Scope),
        (input_pb2.ChatMessage, request.ChatMessage),
        (receipt_pb2.Receipt, reply.Receipt),
        (receipt_pb2.InterventionReceipt, reply.InterventionReceipt),
        (activation_pb.TokenText, reply.TokenText),
        (activation_pb.GetActivationsResponse, reply.ActivationPart),
        (server_info_service_pb2.Limits, catalog.ServerLimits),
        (pb.StoppedBy, reply.StoppedBy),
        (pb.PolicyFacts, reply.PolicyFacts),
        (edit_pb.Condition, domain.Condition),
        (edit_pb.Window, domain.Window),
    ],
)
def test_messages_and_dataclasses_have_the_same_fields(message: Any, noun: Any) -> None:
    assert names(message.DESCRIPTOR) == {one.name for one in fields(noun)}


def test_what_the_catalogue_knows_is_on_the_wire() -> None:
    assert names(catalog_pb.Feature.DESCRIPTOR) - {"sae"} == set(catalogue.CatalogueFeature.__struct_fields__)
    assert names(catalog_pb.SaeQuality.DESCRIPTOR) == set(catalogue.Quality.__struct_fields__)
    assert names(catalog_pb.GetModelResponse.DESCRIPTOR) - {"sites"} == {one.name for one in fields(ModelInfo)}


def test_every_service_of_the_package_is_served() -> None:
    assert len(SERVICES) == 5
    assert all(one.startswith("saeguard.v1.") for one in SERVICES)
