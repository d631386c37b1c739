"""How an RPC ended: turns whatever left the handler into one of our errors, or lets the core's own way out pass."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import TYPE_CHECKING

import grpc

from saeguard_server.edge.errors import STATUS
from saeguard_server.errors import DeadlineExceeded, InternalFailure, SaeguardError

if TYPE_CHECKING:
    from saeguard_server.edge.types import Context

LOG = logging.getLogger("saeguard.rpc")

ALMOST_OVER_S = 0.01
"""The core cancels at the deadline; its clock and ours differ by less than this."""

CORE_ENDS_WITHIN_S = 1.0
"""How long the core is waited for where the caller's deadline is its to answer; far more than it takes."""


class Outcome:
    """A context manager around the handler. It swallows what becomes ``error``; the caller must then abort with it.

    Cancellation and the core's own aborts are noted in ``code`` and go on.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.code = grpc.StatusCode.OK
        self.error: SaeguardError | None = None
        self.timeout: asyncio.Timeout | None = None

    def __enter__(self) -> Outcome:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            return False
        if isinstance(error, grpc.aio.AbortError):
            self.code = _as_code(self._context.code())
            return False
        if isinstance(error, asyncio.CancelledError) and _is_ours_to_leave():
            self.code = grpc.StatusCode.DEADLINE_EXCEEDED if self._is_late() else grpc.StatusCode.CANCELLED
            return False
        if not isinstance(error, Exception | asyncio.CancelledError):
            return False
        self.error = self._ours(error)
        self.code = STATUS[type(self.error)]
        return True

    @property
    def is_for_the_core(self) -> bool:
        """Whether the caller's own deadline is what ended this RPC, so that the core on both sides says so.

        An answer of ours would race with that, and gRPC logs the one that loses as an error.
        """
        return isinstance(self.error, DeadlineExceeded) and self._is_late()

    def _is_late(self) -> bool:
        left = self._context.time_remaining()
        return left is not None and left <= ALMOST_OVER_S

    def _ours(self, error: BaseException) -> SaeguardError:
        if isinstance(error, TimeoutError) and self.timeout is not None and self.timeout.expired():
            return DeadlineExceeded("the time allowed for this request is over")
        if isinstance(error, SaeguardError) and not isinstance(error, InternalFailure):
            return error
        LOG.error("unexpected error", exc_info=error)
        return error if isinstance(error, InternalFailure) else InternalFailure("unexpected error")


def _is_ours_to_leave() -> bool:
    """Whether this task was asked to stop, rather than something it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _as_code(code: grpc.StatusCode | int) -> grpc.StatusCode:
    """The aio context gives the number where the annotation promises the enum."""
    if isinstance(code, grpc.StatusCode):
        return code
    return next(one for one in grpc.StatusCode if one.value[0] == code)
