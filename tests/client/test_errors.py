"""Every status with its details becomes the exception that the tree promises."""

from __future__ import annotations

import inspect
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2 as details

import saeguard_client
from saeguard_client import Model, errors
from saeguard_client.calls import CallOptions, unary

PAIRS = [(code, cls) for code, cls in errors.BY_STATUS.items()]


def test_every_status_but_ok_has_an_exception() -> None:
    assert set(errors.BY_STATUS) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


def test_every_exception_has_a_status_and_is_exported_and_drawn() -> None:
    classes = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)}
    assert len(classes) > 10
    assert classes - {errors.SaeguardError, errors.ReceiptMismatch} == set(errors.BY_STATUS.values())
    for cls in classes:
        assert getattr(saeguard_client, cls.__name__) is cls
        assert cls.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(("code", "cls"), PAIRS, ids=lambda value: getattr(value, "name", ""))
@pytest.mark.parametrize("method", ["generate", "generate_stream"])
def test_rich_status(server: Any, shell: Any, method: str, code: grpc.StatusCode, cls: Any) -> None:
    field = "interventions[2].clamp.value"

    def refuse(request: Any, context: Any) -> Any:
        return server.refuse(
            context,
            code,
            f"{field}: must be finite",
            details.ErrorInfo(reason="SOME_REASON", domain="saeguard.v1", metadata={"sae": "resid4"}),
            details.BadRequest(
                field_violations=[details.BadRequest.FieldViolation(field=field, description="must be finite")]
            ),
            details.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
        )

    server.on("Generate", refuse)
    server.on("GenerateStream", refuse)
    with pytest.raises(errors.SaeguardError) as caught:
        shell.call(method, "a") if method == "generate" else list(shell.stream(method, "a"))
    error = caught.value
    assert type(error) is cls
    assert (error.message, error.reason) == (f"{field}: must be finite", "SOME_REASON")
    assert error.metadata == {"sae": "resid4"}
    assert error.violations == (errors.FieldViolation(field, "must be finite"),)
    assert error.retry_after_s == 1.5
    assert str(error) == error.message


def test_a_plain_status_has_its_codes_name_as_reason(server: Any, shell: Any) -> None:
    server.on("GetModel", lambda request, context: context.abort(grpc.StatusCode.NOT_FOUND, "no such thing"))
    with pytest.raises(saeguard_client.NotFound) as caught:
        shell.call("model")
    error = caught.value
    assert (error.reason, error.metadata, error.violations, error.retry_after_s) == ("NOT_FOUND", {}, (), None)


def test_a_proxys_reason_is_not_the_servers(server: Any, shell: Any) -> None:
    foreign = details.ErrorInfo(reason="RATE", domain="proxy.example", metadata={"a": "b"})
    server.on("GetModel", lambda request, context: server.refuse(context, grpc.StatusCode.ABORTED, "x", foreign))
    with pytest.raises(saeguard_client.Aborted) as caught:
        shell.call("model")
    assert (caught.value.reason, caught.value.metadata) == ("ABORTED", {})


def test_details_that_contradict_the_status_are_left_out(server: Any, shell: Any) -> None:
    def contradict(request: Any, context: Any) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\x08\x03"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")

    server.on("GetModel", contradict)
    with pytest.raises(saeguard_client.NotFound, match="no such thing"):
        shell.call("model")


def test_unreadable_replies_are_internal_errors() -> None:
    not_utf8 = b"\x0a\x01\xff"
    with pytest.raises(saeguard_client.InternalError, match="not a GetModelResponse"):
        unary("GetModel", Model, CallOptions()).read(not_utf8)


def test_nobody_there(open_shell: Any) -> None:
    shell = open_shell("127.0.0.1:1", retries=0)
    with pytest.raises(saeguard_client.Unavailable):
        shell.call("generate", "a")
    with pytest.raises(saeguard_client.Unavailable):
        list(shell.stream("generate_stream", "a"))
    assert shell.call("healthy") is False
