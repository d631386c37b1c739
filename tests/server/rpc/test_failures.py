"""What callers see when something is refused or goes wrong: status, details, retry hints."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from saeguard.v1 import catalog_service_pb2 as catalog_pb
from saeguard.v1 import generation_service_pb2 as pb
from saeguard.v1 import input_pb2
from saeguard_server import errors
from saeguard_server.caller import Call
from saeguard_server.errors import (
    InternalFailure,
    InvalidRequest,
    NonFiniteOutput,
    Overloaded,
    RequestFieldError,
    ServiceError,
    Unavailable,
)
from saeguard_server.rpc.interceptor import rpc_failure


def all_errors(base: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    for kind in base.__subclasses__():
        if kind is not RequestFieldError:
            yield kind
        yield from all_errors(kind)


async def finish(call: Any) -> None:
    if isinstance(call, grpc.aio.UnaryStreamCall):
        async for _ in call:
            pass
    else:
        await call


async def failed(call: Any) -> tuple[grpc.aio.AioRpcError, dict[str, Any]]:
    """The error of a call and its details by type name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish(call)
    error = caught.value
    status = await rpc_status.aio.from_call(call)
    found: dict[str, Any] = {}
    for packed in status.details if status is not None else ():
        kind = getattr(error_details_pb2, packed.type_url.rpartition(".")[2])
        found[kind.__name__] = kind()
        packed.Unpack(found[kind.__name__])
    return error, found


def both(running: Any, **fields: Any) -> list[Any]:
    return [
        running.generation.Generate(pb.GenerateRequest(**fields)),
        running.generation.GenerateStream(pb.GenerateRequest(**fields)),
    ]


def test_every_error_has_a_status_and_a_reason_of_its_own() -> None:
    found = set(all_errors())
    assert {InvalidRequest, Overloaded} <= found
    assert {kind.status for kind in found} <= set(grpc.StatusCode.__members__)
    assert len({one.reason for one in found}) == len(found)
    assert {one.__name__ for one in found} <= set(vars(errors))


async def test_a_wrong_field_is_named_on_both_forms(running: Any) -> None:
    for call in both(running, text="hi", sampling=pb.Sampling(top_p=1.5)):
        error, details = await failed(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "sampling.top_p: must be above 0 and at most 1, got 1.5"
        info = details["ErrorInfo"]
        assert (info.reason, info.domain) == ("INVALID_REQUEST", "saeguard.v1")
        (violation,) = details["BadRequest"].field_violations
        assert violation.field == "sampling.top_p"
        assert violation.description.startswith("must be above")
        assert dict(error.trailing_metadata())["x-request-id"] == info.metadata["request_id"]


async def test_an_unknown_name_is_not_found_and_names_the_field(running: Any) -> None:
    error, details = await failed(running.catalog.GetFeature(catalog_pb.GetFeatureRequest(sae="nope")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert details["ErrorInfo"].reason == "UNKNOWN_NAME"
    assert details["BadRequest"].field_violations[0].field == "sae"
    assert "served are late, mid" in error.details()


async def test_errors_in_the_middle_of_a_stream_keep_their_details(running: Any) -> None:
    running.engine.error = NonFiniteOutput("not finite after token 1")
    for call in both(running, text="hi"):
        error, details = await failed(call)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert details["ErrorInfo"].reason == "NON_FINITE_OUTPUT"


@pytest.mark.parametrize("error", [KeyError("secret"), InternalFailure("secret"), TimeoutError("secret")])
async def test_our_bugs_are_internal_and_say_nothing(running: Any, error: Exception) -> None:
    running.engine.error = error
    for call in both(running, text="hi"):
        seen, details = await failed(call)
        assert seen.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(seen)
        assert details["ErrorInfo"].reason == "INTERNAL"
        assert details["ErrorInfo"].metadata["request_id"] in seen.details()


async def test_a_cancellation_from_inside_is_our_bug(running: Any) -> None:
    async def broken(*_: object) -> Any:
        raise asyncio.CancelledError
        yield

    running.generate.stream = broken
    for call in both(running, text="hi"):
        error, _ = await failed(call)
        assert error.code() is grpc.StatusCode.INTERNAL


async def test_a_stream_without_a_completion_is_our_bug(running: Any) -> None:
    async def nothing(*_: object) -> Any:
        return
        yield

    running.generate.stream = nothing
    for call in both(running, text="hi"):
        error, _ = await failed(call)
        assert error.code() is grpc.StatusCode.INTERNAL


async def test_a_full_queue_says_when_to_come_back(running: Any) -> None:
    running.engine.waiting = 2
    for call in both(running, text="hi"):
        error, details = await failed(call)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        pushback = int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])
        assert 200 <= pushback <= 45_000
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == pushback
    assert running.metrics.refusals.labels("queue_full")._value.get() == 2


async def test_an_engine_that_is_not_ready_is_unavailable(running: Any) -> None:
    running.engine.ready = False
    error, details = await failed(running.generation.Generate(pb.GenerateRequest(text="hi")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1000
    assert (await running.catalog.GetModel(catalog_pb.GetModelRequest())).name == "fake"


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_clients_retry_a_refusal_after_the_time_it_names(running: Any, method: str) -> None:
    refusals = [Overloaded("no", 0.3), Unavailable("no", 0.2)]
    seen: list[float] = []

    def refuse(*_: object) -> Any:
        seen.append(asyncio.get_running_loop().time())
        if refusals:
            raise refusals.pop()
        return real(*_)

    real, running.generate.stream = running.generate.stream, refuse
    policy = (
        '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 4, "initialBackoff": "0.01s",'
        ' "maxBackoff": "0.01s", "backoffMultiplier": 1,'
        ' "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]}}]}'
    )
    async with grpc.aio.insecure_channel(running.address, options=[("grpc.service_config", policy)]) as channel:
        # A unary reply, too, is a stream of one message.
        path = f"/saeguard.v1.GenerationService/{method}"
        send = channel.unary_stream(path, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString)
        parts = [part.text async for part in send(pb.GenerateRequest(text="hi"), timeout=5)]
    assert parts[0].startswith("w3")
    assert len(seen) == 3
    assert seen[1] - seen[0] >= 0.19
    assert seen[2] - seen[1] >= 0.29


async def test_long_texts_are_quoted_in_part(running: Any) -> None:
    role = "é" * 500_000
    chat = input_pb2.ChatInput(messages=[input_pb2.ChatMessage(role=role, content="x")])
    error, details = await failed(running.generation.Generate(pb.GenerateRequest(chat=chat)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().endswith("...")
    assert details["BadRequest"].field_violations[0].field == "chat.messages[0].role"


def test_the_worst_message_fits_the_trailers() -> None:
    call = Call("r" * 32, 0.0, client_request_id="c" * 64)
    status = rpc_failure(InvalidRequest("interventions[255].scope.include_special_tokens", "é" * 10_000), call)
    # grpc-message is percent-encoded, binary trailers travel in base64.
    total = 3 * len(status.details.encode()) + sum(4 * len(value) // 3 for _, value in status.trailing_metadata)
    assert total < 8192


async def test_the_deadline_of_the_server_ends_a_request_and_its_task(running: Any, eventually: Any) -> None:
    server_limit = 0.2
    running.engine.step_s = 0.05
    running.interceptor.max_deadline_s = server_limit
    for call in both(running, text="hi", sampling=pb.Sampling(max_new_tokens=1000)):
        error, details = await failed(call)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert details["ErrorInfo"].reason == "DEADLINE_EXCEEDED"
        await eventually(lambda: running.engine.running == 0)
    await eventually(lambda: code_count(running, "DeadlineExceeded") == 2)


async def test_the_deadline_of_the_caller_reaches_the_flow_and_frees_the_task(running: Any, eventually: Any) -> None:
    running.engine.step_s = 0.02
    loop = asyncio.get_running_loop()
    began = loop.time()
    call = running.generation.GenerateStream(
        pb.GenerateRequest(text="hi", sampling=pb.Sampling(max_new_tokens=1000)), timeout=0.2
    )
    error, _ = await failed(call)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.1 < running.generate.calls[0].deadline - began < 1.0
    await eventually(lambda: running.engine.running == 0)
    await eventually(lambda: code_count(running, "DeadlineExceeded") == 1)


async def test_a_caller_who_leaves_closes_the_engines_iterator(running: Any, eventually: Any) -> None:
    running.engine.step_s = 0.02
    stream = running.generation.GenerateStream(pb.GenerateRequest(text="hi", sampling=pb.Sampling(max_new_tokens=1000)))
    await stream.read()
    assert running.engine.running == 1
    stream.cancel()
    await eventually(lambda: running.engine.running == 0)
    await eventually(lambda: code_count(running, "Canceled") == 1)
    assert await running.admission.idle(within_s=1)


async def test_a_caller_who_leaves_before_the_first_token_frees_the_task(running: Any, eventually: Any) -> None:
    running.engine.step_s = 30.0
    call = running.generation.Generate(pb.GenerateRequest(text="hi"))
    waiting = asyncio.ensure_future(call)
    await eventually(lambda: running.engine.running == 1)
    call.cancel()
    await eventually(lambda: running.engine.running == 0)
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_an_unknown_method_is_unimplemented_and_leaves_no_label(running: Any) -> None:
    for method in ("/saeguard.v1.GenerationService/Nope", "/made.up/Thing"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.channel.unary_unary(method)(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not list(running.metrics.rpcs_started.collect()[0].samples)


def code_count(running: Any, code: str) -> float:
    samples = running.metrics.rpcs_handled.collect()[0].samples
    return sum(one.value for one in samples if one.name.endswith("_total") and one.labels["grpc_code"] == code)
