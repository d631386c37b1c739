"""grpc.health.v1, and who is SERVING when.

Not grpc_health's own aio servicer: there, a Watch that ends forgets the other watchers of its service, and one that
does not read holds the lock that setting a status needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from grpc_health.v1 import health_pb2, health_pb2_grpc

from saeguard_server.errors import UnknownName

OVERALL = ""
LIVENESS = "liveness"
"""SERVING for as long as the process answers, so that a draining server is not killed for being unready."""

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

POLL_S = 0.25


class Health(health_pb2_grpc.HealthServicer):
    """Answers for the server as a whole, for ``liveness``, and for each service by its full name."""

    def __init__(self, services: Sequence[str]) -> None:
        self._status: dict[str, int] = dict.fromkeys([OVERALL, *services], NOT_SERVING) | {LIVENESS: SERVING}
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: object) -> health_pb2.HealthCheckResponse:
        """The status now.

        Raises:
            UnknownName: no such service.
        """
        if request.service not in self._status:
            raise UnknownName("service", "is not a service of this server")
        return health_pb2.HealthCheckResponse(status=self._status[request.service])

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: object
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and whenever it changes."""
        last: int | None = None
        while True:
            changed, status = self._changed, self._status.get(request.service, SERVICE_UNKNOWN)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            else:
                await changed.wait()

    def set_ready(self, is_ready: bool) -> None:
        """Says whether new requests are welcome; ``liveness`` stays SERVING."""
        status = SERVING if is_ready else NOT_SERVING
        if self._status[OVERALL] != status:
            self._status |= dict.fromkeys(self._status.keys() - {LIVENESS}, status)
            # A new event for those who wait from now on: nobody has to be counted or kept.
            self._changed.set()
            self._changed = asyncio.Event()

    async def follow(self, is_ready: Callable[[], bool]) -> None:
        """Keeps the status equal to ``is_ready()``, until cancelled."""
        while True:
            self.set_ready(is_ready())
            await asyncio.sleep(POLL_S)
