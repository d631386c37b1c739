"""Parsing is total: what is wrong is refused by the path of its field, and what is right means what was said."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from saeguard.v1 import activation_service_pb2 as activation_pb
from saeguard.v1 import generation_service_pb2 as pb
from saeguard.v1 import input_pb2
from saeguard.v1 import intervention_pb2 as edit_pb
from saeguard_sae.edits import Zero
from saeguard_server.errors import InvalidRequest
from saeguard_server.interventions import Intervention, Scope
from saeguard_server.request import Named, Sampling
from saeguard_server.rpc.wire.activations import activation_request
from saeguard_server.rpc.wire.fields import at
from saeguard_server.rpc.wire.generation import generation_request
from saeguard_server.settings import LimitSettings

LIMITS = LimitSettings(
    max_interventions=3, max_watch=2, max_activation_inputs=2, max_activation_values=5,
)  # fmt: skip
MAX32 = 2**32 - 1


def edit(**fields: Any) -> edit_pb.Intervention:
    return edit_pb.Intervention(**{"sae": "mid", "feature": 1} | fields)


def ok(feature: int = 1) -> edit_pb.Intervention:
    return edit(feature=feature, zero=edit_pb.Zero())


def steered(*edits: edit_pb.Intervention) -> dict[str, Any]:
    return {"text": "x", "interventions": edits}


def sampled(**fields: Any) -> dict[str, Any]:
    return {"text": "x", "sampling": pb.Sampling(**fields)}


def ref(sae: str = "mid", feature: int = 1) -> pb.FeatureRef:
    return pb.FeatureRef(sae=sae, feature=feature)


def chat(*roles: str) -> input_pb2.ChatInput:
    return input_pb2.ChatInput(messages=[input_pb2.ChatMessage(role=role, content="x") for role in roles])


WRONG_GENERATIONS: list[tuple[str, dict[str, Any]]] = [
    ("input", {}),
    ("text", {"text": ""}),
    ("tokens.ids", {"tokens": input_pb2.TokenInput()}),
    ("chat.messages", {"chat": chat()}),
    ("chat.messages[1].role", {"chat": chat("user", "robot")}),
    ("interventions", steered(*[ok(index) for index in range(4)])),
    ("interventions[1].kind", steered(ok(), edit(feature=2))),
    ("interventions[0].sae", steered(edit(sae="", zero=edit_pb.Zero()))),
    ("interventions[2].clamp.value", steered(ok(1), ok(2), edit(feature=3, clamp=edit_pb.Clamp(value=nan)))),
    ("interventions[0].clamp.unit", steered(edit(clamp=edit_pb.Clamp(value=1, unit=77)))),  # type: ignore[arg-type]
    ("interventions[0].scale.factor", steered(edit(scale=edit_pb.Scale(factor=1e39)))),
    ("interventions[0].add.value", steered(edit(add=edit_pb.Add(value=inf)))),
    ("interventions[0].scope.phase", steered(edit(zero={}, scope=edit_pb.Scope(phase=-1)))),  # type: ignore[arg-type]
    ("interventions[0].scope.end", steered(edit(zero={}, scope=edit_pb.Scope(start=5, end=5)))),
    ("interventions[1].feature", steered(ok(), ok())),
    ("max_relative_edit", {"text": "x", "max_relative_edit": 0.0}),
    ("watch", {"text": "x", "watch": [ref(), ref()]}),
    ("watch", {"text": "x", "watch": [ref(feature=index) for index in range(3)]}),
    ("watch[1].sae", {"text": "x", "watch": [ref(), ref(sae="")]}),
    ("sampling.max_new_tokens", sampled(max_new_tokens=0)),
    ("sampling.temperature", sampled(temperature=-0.1)),
    ("sampling.temperature", sampled(temperature=1e-9)),
    ("sampling.temperature", sampled(temperature=nan)),
    ("sampling.top_p", sampled(top_p=0.0)),
    ("sampling.min_p", sampled(min_p=1.1)),
    ("sampling.repetition_penalty", sampled(repetition_penalty=0.0)),
    ("sampling.logprobs", sampled(logprobs=21)),
    ("sampling.stop", sampled(stop=["x"] * 17)),
    ("sampling.stop[1]", sampled(stop=["x", ""])),
]


@pytest.mark.parametrize(("field", "fields"), WRONG_GENERATIONS)
def test_what_is_wrong_with_a_generation_is_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generation_request(pb.GenerateRequest(**fields), LIMITS)
    assert caught.value.field == field
    assert caught.value.description


def one_input() -> activation_pb.ActivationInput:
    return activation_pb.ActivationInput(text="x")


WRONG_ACTIVATIONS: list[tuple[str, dict[str, Any]]] = [
    ("inputs", {"saes": ["mid"], "top_k": 1}),
    ("inputs", {"inputs": [one_input()] * 3, "saes": ["mid"], "top_k": 1}),
    ("inputs[1].input", {"inputs": [one_input(), activation_pb.ActivationInput()], "saes": ["mid"], "top_k": 1}),
    ("inputs[0].text", {"inputs": [activation_pb.ActivationInput(text="")], "saes": ["mid"], "top_k": 1}),
    ("inputs[0].tokens.ids", {"inputs": [{"tokens": {}}], "saes": ["mid"], "top_k": 1}),
    ("inputs[0].chat.messages[0].role", {"inputs": [{"chat": chat("me")}], "saes": ["mid"], "top_k": 1}),
    ("selection", {"inputs": [one_input()], "saes": ["mid"]}),
    ("saes", {"inputs": [one_input()], "top_k": 1}),
    ("saes", {"inputs": [one_input()], "saes": ["mid", "mid"], "top_k": 1}),
    ("saes[1]", {"inputs": [one_input()], "saes": ["mid", ""], "top_k": 1}),
    ("top_k", {"inputs": [one_input()], "saes": ["mid"], "top_k": 0}),
    ("top_k", {"inputs": [one_input()], "saes": ["mid"], "top_k": 6}),
    ("threshold", {"inputs": [one_input()], "saes": ["mid"], "threshold": -1.0}),
    ("threshold", {"inputs": [one_input()], "saes": ["mid"], "threshold": nan}),
    ("features.features", {"inputs": [one_input()], "features": {}}),
    ("features.features", {"inputs": [one_input()], "features": {"features": [ref(), ref()]}}),
    ("features.features", {"inputs": [one_input()], "features": {"features": [ref(feature=i) for i in range(6)]}}),
    ("features.features[0].sae", {"inputs": [one_input()], "features": {"features": [ref(sae="")]}}),
    ("interventions[0].kind", {"inputs": [one_input()], "saes": ["mid"], "top_k": 1, "interventions": [edit()]}),
]


@pytest.mark.parametrize(("field", "fields"), WRONG_ACTIVATIONS)
def test_what_is_wrong_with_a_reading_is_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        activation_request(activation_pb.GetActivationsRequest(**fields), LIMITS)
    assert caught.value.field == field


def test_what_is_not_said_is_the_servers_choice_and_zero_is_not_unsaid() -> None:
    silent = generation_request(pb.GenerateRequest(text="x"), LIMITS)
    assert silent.sampling == Sampling()
    assert silent.max_relative_edit is None
    said = generation_request(pb.GenerateRequest(**sampled(temperature=0.0, seed=0, logprobs=0, top_k=0)), LIMITS)
    assert said.sampling == Sampling(temperature=0.0, seed=0, logprobs=0, top_k=0)
    assert said.sampling != silent.sampling


def test_the_largest_numbers_of_the_wire_are_kept() -> None:
    request = generation_request(
        pb.GenerateRequest(**steered(edit(feature=MAX32, zero={}, scope=edit_pb.Scope(start=MAX32 - 1, end=MAX32)))),
        LIMITS,
    )
    (one,) = request.interventions
    assert one == Intervention(one.target, Zero(), Scope(start=MAX32 - 1, end=MAX32))
    assert one.target.feature == MAX32


def test_named_features_need_no_saes() -> None:
    request = activation_request(
        activation_pb.GetActivationsRequest(inputs=[one_input()], features={"features": [ref()]}), LIMITS
    )
    assert request.saes == ()
    assert isinstance(request.selection, Named)


def test_a_message_that_names_no_field_is_about_the_whole_and_quotes_nothing_as_a_field() -> None:
    with pytest.raises(InvalidRequest) as caught, at("sampling"):
        raise ValueError("My Prompt: secret")
    assert caught.value.field == "sampling"
