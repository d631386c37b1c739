"""ActivationService: which features fire on which token."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from saeguard.v1 import activation_service_pb2 as activation_pb
from saeguard.v1.activation_service_pb2_grpc import ActivationServiceServicer
from saeguard_server.edge import call as calls
from saeguard_server.edge.closing import closing
from saeguard_server.edge.wire import activations as activation_wire
from saeguard_server.guard.limits import Admission
from saeguard_server.reply import ActivationPart
from saeguard_server.request import ActivationRequest, Call
from saeguard_server.settings import LimitSettings


class Reads(Protocol):
    """The flow behind GetActivations."""

    def stream(self, request: ActivationRequest, call: Call) -> AsyncIterator[ActivationPart]:
        """Parts of whole tokens."""
        ...


class ActivationServicer(ActivationServiceServicer):
    """Parses, admits, streams in messages of bounded size."""

    def __init__(self, flow: Reads, admission: Admission, limits: LimitSettings) -> None:
        self._flow = flow
        self._admission = admission
        self._limits = limits

    async def GetActivations(
        self, request: activation_pb.GetActivationsRequest, context: object
    ) -> AsyncIterator[activation_pb.GetActivationsResponse]:
        """Reads the inputs once and streams what fired."""
        asked = activation_wire.activation_request(request, self._limits)
        with self._admission.work(calls.current().caller):
            async with closing(self._flow.stream(asked, calls.current())) as parts:
                async for part in parts:
                    for message in activation_wire.responses(part):
                        yield message
