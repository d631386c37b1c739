"""GenerationService: the stream, and the stream gathered into one reply."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from saeguard.v1 import generation_service_pb2 as generation_pb
from saeguard.v1.generation_service_pb2_grpc import GenerationServiceServicer
from saeguard_server.edge import call as calls
from saeguard_server.edge.closing import closing
from saeguard_server.edge.wire import generation as generation_wire
from saeguard_server.errors import InternalFailure
from saeguard_server.flows.compare import Comparison
from saeguard_server.guard.limits import Admission
from saeguard_server.reply import Chunk
from saeguard_server.request import Call, GenerationRequest
from saeguard_server.settings import LimitSettings


class Generates(Protocol):
    """The flow behind both RPCs."""

    def stream(self, request: GenerationRequest, call: Call) -> AsyncIterator[Chunk]:
        """Chunks, the last with a completion."""
        ...


class Compares(Protocol):
    """The flow behind Compare."""

    async def run(self, request: GenerationRequest, call: Call) -> Comparison:
        """The request with and without all that is done to it."""
        ...


class GenerationServicer(GenerationServiceServicer):
    """Parses, admits, streams."""

    def __init__(self, flow: Generates, comparison: Compares, admission: Admission, limits: LimitSettings) -> None:
        self._flow, self._comparison = flow, comparison
        self._admission = admission
        self._limits = limits

    async def Generate(self, request: generation_pb.GenerateRequest, context: object) -> generation_pb.GenerateResponse:
        """The whole completion in one reply."""
        chunks = [chunk async for chunk in self._chunks(request)]
        return generation_wire.whole_response(chunks, calls.current().request_id)

    async def GenerateStream(
        self, request: generation_pb.GenerateRequest, context: object
    ) -> AsyncIterator[generation_pb.GenerateResponse]:
        """The completion as it is made."""
        request_id = calls.current().request_id
        is_complete = False
        async with closing(self._chunks(request)) as chunks:
            async for chunk in chunks:
                is_complete = chunk.completion is not None
                yield generation_wire.chunk_response(chunk, request_id)
        if not is_complete:
            raise InternalFailure("a generation ended without its completion")

    async def Compare(self, request: generation_pb.GenerateRequest, context: object) -> generation_pb.CompareResponse:
        """Both completions in one reply."""
        generation = generation_wire.generation_request(request, self._limits)
        with self._admission.work(calls.current().caller):
            comparison = await self._comparison.run(generation, calls.current())
        return generation_wire.compare_response(comparison, calls.current().request_id)

    async def _chunks(self, request: generation_pb.GenerateRequest) -> AsyncIterator[Chunk]:
        generation = generation_wire.generation_request(request, self._limits)
        with self._admission.work(calls.current().caller):
            async with closing(self._flow.stream(generation, calls.current())) as chunks:
                async for chunk in chunks:
                    yield chunk
