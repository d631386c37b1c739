"""A record says all that was asked: what is read back from it is the request."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from hypothesis import given

from saeguard_server.audit import log
from saeguard_server.request import GenerationRequest
from support.strategies import generations


@given(generations)
def test_a_request_can_be_made_again(request: GenerationRequest) -> None:
    told = msgspec.json.decode(msgspec.json.encode(log.request_record(request)))
    assert log.request_from_record(told, request.prompt) == replace(request, min_policy_activation=None)


@given(generations)
def test_no_record_holds_the_prompt(request: GenerationRequest) -> None:
    assert "prompt" not in log.request_record(request)
