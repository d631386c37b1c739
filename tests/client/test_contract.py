"""What must not drift: the two clients, the wire and the dataclasses, the exported names, the imports."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

import saeguard_client
from saeguard.v1 import (
    activation_service_pb2,
    catalog_service_pb2,
    condition_pb2,
    generation_service_pb2,
    intervention_pb2,
    receipt_pb2,
    server_info_service_pb2,
)
from saeguard_client import AsyncClient, Client, Completion, api
from saeguard_client._wire.mirror import MIRRORS
from saeguard_client.conditions import COMPARISONS, WINDOWS, Condition, Term, Window
from saeguard_client.interventions import KINDS, Intervention
from saeguard_client.sampling import Sampling
from saeguard_client.scopes import PHASES, UNITS, Scope
from saeguard_client.triggers import ACTIONS

FILES = (
    activation_service_pb2,
    catalog_service_pb2,
    generation_service_pb2,
    receipt_pb2,
    server_info_service_pb2,
)
MESSAGES: dict[str, Descriptor] = {k: v for file in FILES for k, v in file.DESCRIPTOR.message_types_by_name.items()}


def public_methods(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("_")}


def names(cls: type) -> set[str]:
    return {field.name for field in fields(cls)}


def test_both_clients_take_the_same_arguments() -> None:
    sync, asynchronous = public_methods(Client), public_methods(AsyncClient)
    assert {"generate", "generate_stream", "activations", "features", "close"} <= sync.keys()
    assert sync.keys() == asynchronous.keys()
    for name in sync.keys() - {"close"}:
        assert inspect.signature(sync[name]) == inspect.signature(asynchronous[name]), name
        assert sync[name].__name__ == name
        assert sync[name].__doc__ == asynchronous[name].__doc__


def test_constructors_differ_in_the_channel_only() -> None:
    def settings(cls: type) -> dict[str, Any]:
        parameters = inspect.signature(cls).parameters
        return {name: (p.kind, p.default) for name, p in parameters.items()}

    assert settings(Client) == settings(AsyncClient)


def test_a_methods_signature_is_its_builders_for_bound_methods_too() -> None:
    shown = inspect.signature(Client("127.0.0.1:1").generate)
    assert list(shown.parameters) == list(inspect.signature(api.generate).parameters)
    assert list(shown.parameters)[:2] == ["input", "steer"]


def test_every_wire_kind_has_an_edit_with_the_same_fields() -> None:
    wire = {f.name: f.message_type for f in intervention_pb2.Intervention.DESCRIPTOR.oneofs_by_name["kind"].fields}
    assert wire.keys() == KINDS.keys()
    for name, message in wire.items():
        assert {f.name for f in message.fields} == names(KINDS[name]) - names(Intervention), name


def test_scope_sampling_units_and_phases_are_the_wires() -> None:
    assert set(intervention_pb2.Scope.DESCRIPTOR.fields_by_name) == names(Scope)
    assert set(generation_service_pb2.Sampling.DESCRIPTOR.fields_by_name) == names(Sampling)
    assert {f"UNIT_{unit.upper()}" for unit in UNITS} == set(intervention_pb2.Unit.keys()) - {"UNIT_UNSPECIFIED"}
    assert {f"PHASE_{phase.upper()}" for phase in PHASES} == set(intervention_pb2.Phase.keys()) - {"PHASE_UNSPECIFIED"}


def test_conditions_and_triggers_are_the_wires() -> None:
    for message, cls in (("Condition", Condition), ("Term", Term), ("Window", Window)):
        assert set(intervention_pb2.DESCRIPTOR.message_types_by_name[message].fields_by_name) == names(cls)
    comparisons, windows = set(intervention_pb2.Comparison.keys()), set(intervention_pb2.WindowKind.keys())
    assert {f"COMPARISON_{one.upper()}" for one in COMPARISONS} == comparisons - {"COMPARISON_UNSPECIFIED"}
    assert {f"WINDOW_KIND_{one.upper()}" for one in WINDOWS} == windows - {"WINDOW_KIND_UNSPECIFIED"}
    actions = condition_pb2.Trigger.DESCRIPTOR.oneofs_by_name["action"].fields
    assert {one.message_type.name for one in actions} == {one.__name__ for one in ACTIONS}


@pytest.mark.parametrize("name", sorted(MIRRORS))
def test_every_result_has_the_fields_of_its_message(name: str) -> None:
    message = MESSAGES[name]
    assert set(message.fields_by_name) == names(MIRRORS[name])
    optional = {f.name for f in fields(MIRRORS[name]) if f.default is None}
    # Read as None when absent, so the wire must be able to say that they are.
    assert all(message.fields_by_name[field].has_presence for field in optional)
    nested = {f.message_type.name for f in message.fields if f.message_type is not None}
    assert nested <= MIRRORS.keys()


def test_the_completion_holds_the_wires_and_the_text() -> None:
    assert names(Completion) == {"text", "tokens", "readings", "prompt_logprobs"} | set(
        MESSAGES["Completion"].fields_by_name
    )


def test_all_is_complete_sorted_and_importable() -> None:
    exported = saeguard_client.__all__
    assert len(exported) > 30
    assert exported == sorted(exported)
    for name in exported:
        getattr(saeguard_client, name)
    modules = ("results", "catalog", "activations", "client", "async_client", "errors")
    public = {
        name
        for module in modules
        for name, value in vars(getattr(saeguard_client, module)).items()
        if inspect.isclass(value) and value.__module__ == f"saeguard_client.{module}" and not name.startswith("_")
    }
    assert public - set(exported) == set()
    assert {kind.__name__ for kind in KINDS.values()} <= set(exported)


@pytest.mark.parametrize("module", ["saeguard_client", "saeguard_client.cli", "saeguard_client.cli.parser"])
def test_importing_takes_neither_torch_nor_numpy_nor_the_server(module: str) -> None:
    code = f"import sys, {module}; print(*(n for n in ('torch', 'numpy', 'saeguard_server') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")
