"""The frame around every RPC: request id, caller, deadline, drain, errors to statuses, metrics, one log line.

Handlers are rebuilt in the writer style (a coroutine and ``context.write``), so that a cancelled RPC closes its
generators at once and not when they are collected.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from saeguard_server.edge import call as calls
from saeguard_server.edge.doorman import Doorman
from saeguard_server.edge.errors import failure
from saeguard_server.edge.outcome import CORE_ENDS_WITHIN_S, Outcome
from saeguard_server.edge.record import Record
from saeguard_server.errors import InvalidRequest
from saeguard_server.guard.in_flight import InFlight
from saeguard_server.guard.limits import Admission
from saeguard_server.observe.logs import REQUEST_ID
from saeguard_server.observe.metrics import Metrics
from saeguard_server.request import Call

if TYPE_CHECKING:
    from saeguard_server.edge.types import Context, Handler

OURS = "/saeguard."
"""Methods that the deadline and the drain apply to; health and reflection outlive both."""


class Frame(grpc.aio.ServerInterceptor):
    """Puts the frame around unary-unary and unary-stream handlers; others, as reflection's, pass untouched.

    ``open`` counts the RPCs inside it, health's too.
    """

    def __init__(self, metrics: Metrics, admission: Admission, doorman: Doorman, max_deadline_s: float) -> None:
        self._metrics = metrics
        self._admission = admission
        self._doorman = doorman
        self._max_deadline_s = max_deadline_s
        self.open = InFlight()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The handler of this RPC inside the frame."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            # For None, an unknown method, the core answers UNIMPLEMENTED.
            return handler  # type: ignore[return-value]
        return self._framed(handler, handler_call_details.method)

    def _framed(self, handler: Handler, method: str) -> Handler:
        parse = handler.request_deserializer
        serve = _streamed if handler.response_streaming else _single

        async def framed(raw: bytes, context: Context) -> Any:
            async def work(record: Record, call: Call) -> Any:
                return await serve(handler, _parsed(parse, raw), context, record, call)

            return await self._run(method, "server_stream" if handler.response_streaming else "unary", context, work)

        # No deserializer: bytes that are no message are answered by us, with details, and not by the core.
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(framed, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(framed, None, handler.response_serializer)

    async def _run(
        self, method: str, kind: str, context: Context, work: Callable[[Record, Call], Awaitable[Any]]
    ) -> Any:
        is_ours = method.startswith(OURS)
        call = calls.enter(context, self._max_deadline_s if is_ours else float("inf"))
        REQUEST_ID.set(call.request_id)
        record = Record(self._metrics, method, kind, context.peer())
        record.received()
        outcome = Outcome(context)
        try:
            with self.open, outcome, self._admission.rpc() if is_ours else nullcontext():
                async with asyncio.timeout(call.deadline - time.monotonic() if is_ours else None) as outcome.timeout:
                    caller = await self._doorman.recognise(context, method)
                    record.caller = caller.name
                    self._doorman.check(caller, method)
                    return await work(record, calls.identified(call, caller))
        finally:
            record.close(outcome.code, outcome.error, logging.INFO if is_ours else logging.DEBUG)
        # Only reached when ``outcome`` holds an error.
        assert outcome.error is not None
        if outcome.is_for_the_core:
            # It cancels us here, at the latest when its clock says that the caller's time is over.
            await asyncio.sleep(CORE_ENDS_WITHIN_S)
        return await context.abort_with_status(failure(outcome.error, call.request_id))


def _parsed(parse: Callable[[bytes], Any] | None, raw: bytes) -> Any:
    try:
        return parse(raw) if parse is not None else raw
    except DecodeError as err:
        raise InvalidRequest("request", "these bytes are not a message of the expected type") from err


async def _single(handler: Handler, request: Any, context: Context, record: Record, call: Call) -> Any:
    method: Any = handler.unary_unary
    reply = await method(request, context)
    await _send_headers(context, call)
    record.sent()
    return reply


async def _streamed(handler: Handler, request: Any, context: Context, record: Record, call: Call) -> None:
    method: Any = handler.unary_stream
    is_first = True
    async with aclosing(method(request, context)) as replies:
        async for reply in replies:
            if is_first:
                await _send_headers(context, call)
                is_first = False
            await context.write(reply)
            record.sent()


async def _send_headers(context: Context, call: Call) -> None:
    # Not before the first reply: a client retries a refusal only while it has seen no headers.
    sending = asyncio.ensure_future(context.send_initial_metadata(((calls.REQUEST_ID_KEY, call.request_id),)))
    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        # A deadline waits for headers under way: cut off here, gRPC forgets that it sent them, sends them again with
        # the status, and fails at that; the caller would never hear of the end.
        with suppress(grpc.aio.BaseError):
            await sending
        raise
