"""GenerationService: the stream, and the stream gathered into one reply."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from saeguard.v1 import activation_service_pb2 as activation_pb
from saeguard.v1 import catalog_service_pb2 as catalog_pb
from saeguard.v1 import generation_service_pb2 as generation_pb
from saeguard.v1.activation_service_pb2_grpc import ActivationServiceServicer
from saeguard.v1.catalog_service_pb2_grpc import CatalogServiceServicer
from saeguard.v1.generation_service_pb2_grpc import GenerationServiceServicer
from saeguard_server.admission import RpcLimiter
from saeguard_server.catalog import Catalog
from saeguard_server.engine.protocol import Capabilities, ModelInfo
from saeguard_server.errors import InternalFailure
from saeguard_server.generation import Comparison
from saeguard_server.reply import ActivationPart, Chunk
from saeguard_server.request import ActivationRequest, Call, GenerationRequest
from saeguard_server.rpc import interceptor
from saeguard_server.rpc.interceptor import closing
from saeguard_server.rpc.wire import activations
from saeguard_server.rpc.wire import catalog as catalog_wire
from saeguard_server.rpc.wire import generation as generation_wire
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

    def __init__(self, flow: Generates, comparison: Compares, admission: RpcLimiter, limits: LimitSettings) -> None:
        self._flow, self._comparison = flow, comparison
        self._admission = admission
        self._limits = limits

    async def Generate(self, request: generation_pb.GenerateRequest, context: object) -> generation_pb.GenerateResponse:
        """The whole completion in one reply."""
        chunks = [chunk async for chunk in self._chunks(request)]
        return generation_wire.whole_response(chunks, interceptor.current_call().request_id)

    async def GenerateStream(
        self, request: generation_pb.GenerateRequest, context: object
    ) -> AsyncIterator[generation_pb.GenerateResponse]:
        """The completion as it is made."""
        request_id = interceptor.current_call().request_id
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
        with self._admission.work(interceptor.current_call().caller):
            comparison = await self._comparison.run(generation, interceptor.current_call())
        return generation_wire.compare_response(comparison, interceptor.current_call().request_id)

    async def _chunks(self, request: generation_pb.GenerateRequest) -> AsyncIterator[Chunk]:
        generation = generation_wire.generation_request(request, self._limits)
        with self._admission.work(interceptor.current_call().caller):
            async with closing(self._flow.stream(generation, interceptor.current_call())) as chunks:
                async for chunk in chunks:
                    yield chunk


# ActivationService: which features fire on which token.


class Reads(Protocol):
    """The flow behind GetActivations."""

    def stream(self, request: ActivationRequest, call: Call) -> AsyncIterator[ActivationPart]:
        """Parts of whole tokens."""
        ...


class ActivationServicer(ActivationServiceServicer):
    """Parses, admits, streams in messages of bounded size."""

    def __init__(self, flow: Reads, admission: RpcLimiter, limits: LimitSettings) -> None:
        self._flow = flow
        self._admission = admission
        self._limits = limits

    async def GetActivations(
        self, request: activation_pb.GetActivationsRequest, context: object
    ) -> AsyncIterator[activation_pb.GetActivationsResponse]:
        """Reads the inputs once and streams what fired."""
        asked = activations.activation_request(request, self._limits)
        with self._admission.work(interceptor.current_call().caller):
            async with closing(self._flow.stream(asked, interceptor.current_call())) as parts:
                async for part in parts:
                    for message in activations.responses(part):
                        yield message


# CatalogService: the model, its SAEs, their features.


class CatalogServicer(CatalogServiceServicer):
    """Looks things up."""

    def __init__(self, catalog: Catalog, model: ModelInfo, capabilities: Capabilities) -> None:
        self._catalog = catalog
        self._model = catalog_wire.model_response(model, capabilities)
        self._saes = catalog_pb.ListSaesResponse(saes=[catalog_wire.sae(one) for one in catalog.saes()])

    async def GetModel(self, request: catalog_pb.GetModelRequest, context: object) -> catalog_pb.GetModelResponse:
        """The served model."""
        return self._model

    async def ListSaes(self, request: catalog_pb.ListSaesRequest, context: object) -> catalog_pb.ListSaesResponse:
        """Every SAE."""
        return self._saes

    async def GetFeature(self, request: catalog_pb.GetFeatureRequest, context: object) -> catalog_pb.GetFeatureResponse:
        """One feature."""
        found = self._catalog.feature(request.sae, request.feature)
        return catalog_pb.GetFeatureResponse(feature=catalog_wire.feature(found))

    async def ListFeatures(
        self, request: catalog_pb.ListFeaturesRequest, context: object
    ) -> catalog_pb.ListFeaturesResponse:
        """A page of features."""
        # In a thread: words are looked for in every example of every feature.
        page = await asyncio.to_thread(
            self._catalog.features, request.sae, request.query, request.page_size, request.page_token
        )
        return catalog_wire.page_response(page)
