"""The services of generations, activations and the catalogue: each call parses, is admitted, and streams."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import TypeVar

from google.protobuf.message import Message

from saeguard.catalog import Model
from saeguard.checks import FieldError
from saeguard.requests import ActivationRequest, GenerateRequest
from saeguard.results import ActivationPart, StreamChunk, join_chunks
from saeguard.v1 import activation_service_pb2 as activation_pb
from saeguard.v1 import catalog_service_pb2 as catalog_pb
from saeguard.v1 import condition_pb2
from saeguard.v1 import generation_service_pb2 as generation_pb
from saeguard.v1 import intervention_pb2 as edit_pb
from saeguard.v1.activation_service_pb2_grpc import ActivationServiceServicer
from saeguard.v1.catalog_service_pb2_grpc import CatalogServiceServicer
from saeguard.v1.generation_service_pb2_grpc import GenerationServiceServicer
from saeguard.wire import chunk_message, from_message, to_message
from saeguard_server.admission import LoadLimiter
from saeguard_server.catalog import Catalog
from saeguard_server.errors import InternalFailure, InvalidRequest
from saeguard_server.generation import Generation, ReadActivations
from saeguard_server.rpc import interceptor
from saeguard_server.rpc.interceptor import closing
from saeguard_server.settings import LimitSettings

T = TypeVar("T")

MESSAGE_BYTES = 1_000_000
"""About what a message of activations may hold (4 MiB is gRPC's default); one token's are never cut."""
TOKEN_BYTES = 24
"""Of a token besides its text: id, offset, a row pointer, and the framing of each."""
ENTRY_BYTES = 9
"""Of one activation: a float, and an index of at most five bytes."""


class GenerationServicer(GenerationServiceServicer):
    def __init__(self, generation: Generation, limiter: LoadLimiter, limits: LimitSettings) -> None:
        self._generation, self._limiter, self._limits = generation, limiter, limits

    async def Generate(self, request: generation_pb.GenerateRequest, context: object) -> generation_pb.GenerateResponse:
        chunks = [chunk async for chunk in self._chunks(request)]
        try:
            return to_message(generation_pb.GenerateResponse, join_chunks(chunks))
        except ValueError as err:
            raise InternalFailure(str(err)) from err

    async def GenerateStream(
        self, request: generation_pb.GenerateRequest, context: object
    ) -> AsyncIterator[generation_pb.GenerateResponse]:
        is_complete = False
        async with closing(self._chunks(request)) as chunks:
            async for chunk in chunks:
                is_complete = chunk.completion is not None
                yield chunk_message(chunk)
        if not is_complete:
            raise InternalFailure("a generation ended without its completion")

    async def Compare(self, request: generation_pb.GenerateRequest, context: object) -> generation_pb.CompareResponse:
        generation, call = generate_request(request, self._limits), interceptor.current_call()
        with self._limiter.admit(call.caller):
            comparison = await self._generation.compare(generation, call)
        return to_message(generation_pb.CompareResponse, comparison)

    async def _chunks(self, request: generation_pb.GenerateRequest) -> AsyncIterator[StreamChunk]:
        generation, call = generate_request(request, self._limits), interceptor.current_call()
        with self._limiter.admit(call.caller):
            async with closing(self._generation.stream(generation, call)) as chunks:
                async for chunk in chunks:
                    yield chunk


class ActivationServicer(ActivationServiceServicer):
    def __init__(self, activations: ReadActivations, limiter: LoadLimiter, limits: LimitSettings) -> None:
        self._activations, self._limiter, self._limits = activations, limiter, limits

    async def GetActivations(
        self, request: activation_pb.GetActivationsRequest, context: object
    ) -> AsyncIterator[activation_pb.GetActivationsResponse]:
        reading, call = activation_request(request, self._limits), interceptor.current_call()
        with self._limiter.admit(call.caller):
            async with closing(self._activations.stream(reading, call)) as parts:
                async for part in parts:
                    for piece in split_part(part):
                        yield to_message(activation_pb.GetActivationsResponse, piece)


class CatalogServicer(CatalogServiceServicer):
    def __init__(self, catalog: Catalog, model: Model) -> None:
        self._catalog = catalog
        self._model = to_message(catalog_pb.GetModelResponse, model)
        self._saes = catalog_pb.ListSaesResponse(saes=[to_message(catalog_pb.Sae, sae) for sae in catalog.saes()])

    async def GetModel(self, request: catalog_pb.GetModelRequest, context: object) -> catalog_pb.GetModelResponse:
        return self._model

    async def ListSaes(self, request: catalog_pb.ListSaesRequest, context: object) -> catalog_pb.ListSaesResponse:
        return self._saes

    async def GetFeature(self, request: catalog_pb.GetFeatureRequest, context: object) -> catalog_pb.GetFeatureResponse:
        feature = self._catalog.feature(request.sae, request.feature)
        return catalog_pb.GetFeatureResponse(feature=to_message(catalog_pb.Feature, feature))

    async def ListFeatures(
        self, request: catalog_pb.ListFeaturesRequest, context: object
    ) -> catalog_pb.ListFeaturesResponse:
        # In a thread: words are looked for in every example of every feature.
        page = await asyncio.to_thread(
            self._catalog.features, request.sae, request.query, request.page_size, request.page_token
        )
        return to_message(catalog_pb.ListFeaturesResponse, page)


def generate_request(message: generation_pb.GenerateRequest, limits: LimitSettings) -> GenerateRequest:
    """What is too long is refused before any of it is read. Raises InvalidRequest, which names the field."""
    _check_count("watch", message.watch, limits.max_watch)
    _check_count("interventions", message.interventions, limits.max_interventions)
    _check_count("triggers", message.triggers, limits.max_triggers)
    for index, trigger in enumerate(message.triggers):
        path = f"triggers[{index}].apply.interventions"
        _check_count(path, trigger.apply.interventions, limits.max_interventions)
    _check_count("policies", message.policies, limits.max_policies)
    _check_terms(message.interventions, message.triggers, limits.max_condition_terms)
    return _parse(GenerateRequest, message)


def activation_request(message: activation_pb.GetActivationsRequest, limits: LimitSettings) -> ActivationRequest:
    _check_count("inputs", message.inputs, limits.max_activation_inputs)
    _check_count("interventions", message.interventions, limits.max_interventions)
    _check_count("features.features", message.features.features, limits.max_activation_values)
    _check_terms(message.interventions, (), limits.max_condition_terms)
    if message.top_k > limits.max_activation_values:
        raise InvalidRequest("top_k", f"at most {limits.max_activation_values}, got {message.top_k}")
    return _parse(ActivationRequest, message)


def _parse(cls: type[T], message: Message) -> T:
    try:
        return from_message(cls, message)
    except FieldError as err:
        raise InvalidRequest(err.field, err.problem) from err


def _check_count(field: str, items: Sized, limit: int) -> None:
    if len(items) > limit:
        raise InvalidRequest(field, f"at most {limit}, got {len(items)}")


def _check_terms(edits: Iterable[edit_pb.Intervention], triggers: Sequence[condition_pb2.Trigger], limit: int) -> None:
    """A request's own conditions must not read too much together: all who run beside it would wait."""
    applied = (edit for trigger in triggers for edit in trigger.apply.interventions)
    conditions = [edit.when for edit in (*edits, *applied)] + [trigger.when for trigger in triggers]
    terms = sum(len(condition.terms) for condition in conditions)
    if terms > limit:
        field = "triggers" if triggers else "interventions"
        raise InvalidRequest(field, f"all conditions together may have {limit} terms, got {terms}")


def split_part(part: ActivationPart) -> Iterator[ActivationPart]:
    """The part, or several of consecutive tokens where it is too large for a message."""
    first = 0
    for after in _cuts(part):
        low, high = part.indptr[first], part.indptr[after]
        yield replace(
            part,
            tokens=part.tokens[first:after],
            indptr=array("q", [pointer - low for pointer in part.indptr[first : after + 1]]),
            indices=part.indices[low:high],
            values=part.values[low:high],
            start=part.start + first,
            last=part.last and after == len(part.tokens),
        )
        first = after


def _cuts(part: ActivationPart) -> Iterator[int]:
    """Ends of the runs of rows that fit a message; the last one is the number of rows."""
    size, rows = 0, len(part.tokens)
    for row, token in enumerate(part.tokens):
        entries = part.indptr[row + 1] - part.indptr[row]
        cost = TOKEN_BYTES + 4 * len(token.text) + ENTRY_BYTES * entries
        if size and size + cost > MESSAGE_BYTES:
            yield row
            size = 0
        size += cost
    yield rows
