"""The one table from our errors to gRPC's statuses, and the google.rpc details that every failure carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from saeguard_server.errors import (
    ActivationNotReached,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InternalFailure,
    InvalidRequest,
    NonFiniteOutput,
    NotConfigured,
    Overloaded,
    PermissionDenied,
    PoliciesUnavailable,
    PolicyRefusal,
    QuotaExceeded,
    ReadOnlyStore,
    SaeguardError,
    Unauthenticated,
    Unavailable,
    UnknownName,
)

DOMAIN = "saeguard.v1"

STATUS: Mapping[type[SaeguardError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownName: grpc.StatusCode.NOT_FOUND,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    PolicyRefusal: grpc.StatusCode.PERMISSION_DENIED,
    QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Conflict: grpc.StatusCode.ABORTED,
    ReadOnlyStore: grpc.StatusCode.FAILED_PRECONDITION,
    NotConfigured: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    PoliciesUnavailable: grpc.StatusCode.UNAVAILABLE,
    ActivationNotReached: grpc.StatusCode.FAILED_PRECONDITION,
    NonFiniteOutput: grpc.StatusCode.FAILED_PRECONDITION,
    InternalFailure: grpc.StatusCode.INTERNAL,
}

MESSAGE_BYTES = 512
"""A message quotes what the caller sent. Trailers above 8 KiB never arrive, and the message is in them three times."""


@dataclass(frozen=True, slots=True)
class Failure(grpc.Status):
    """What abort_with_status takes: abort_with_status sends these trailers and ignores those set on the context."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def failure(error: SaeguardError, request_id: str) -> Failure:
    """The status that ends an RPC with ``error``."""
    code = STATUS[type(error)]
    message = _public_message(error, request_id)
    number: int = code.value[0]
    rich = status_pb2.Status(code=number, message=message)
    for detail in _details(error, request_id):
        rich.details.append(_packed(detail))
    trailers: tuple[tuple[str, str | bytes], ...] = (*rpc_status.to_status(rich).trailing_metadata,)
    trailers += (("x-request-id", request_id),)
    retry_after_s = _retry_after_s(error)
    if isinstance(error, QuotaExceeded) and retry_after_s is None:
        # Below 0 is "never": the same request would be refused each time.
        trailers += (("grpc-retry-pushback-ms", "-1"),)
    if retry_after_s is not None:
        trailers += (("grpc-retry-pushback-ms", str(round(retry_after_s * 1000))),)
    return Failure(code, message, trailers)


def _public_message(error: SaeguardError, request_id: str) -> str:
    if isinstance(error, InternalFailure):
        return f"internal error; the server's log has more under request id {request_id}"
    return _short(error.message)


def _details(error: SaeguardError, request_id: str) -> list[Message]:
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata={"request_id": request_id, **error.facts}
    )
    details: list[Message] = [info]
    if isinstance(error, InvalidRequest | UnknownName | PolicyRefusal):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=_short(error.description), reason=error.reason
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    retry_after_s = _retry_after_s(error)
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
        details.append(retry)
    return details


def _retry_after_s(error: SaeguardError) -> float | None:
    return error.retry_after_s if isinstance(error, Overloaded | QuotaExceeded | Unavailable) else None


def _packed(detail: Message) -> AnyMessage:
    wrapped = AnyMessage()
    wrapped.Pack(detail)
    return wrapped


def _short(text: str) -> str:
    """At most MESSAGE_BYTES of it, never half a character."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= MESSAGE_BYTES:
        return text
    return encoded[: MESSAGE_BYTES - 3].decode(errors="ignore") + "..."
