"""The real edge on a real socket, with flows that a test controls."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc
import pytest

from saeguard.requests import ActivationRequest, GenerateRequest
from saeguard.results import ActivationPart, Comparison, Completion, StreamChunk, Timings, Token, TokenText, Usage
from saeguard.v1 import (
    activation_service_pb2_grpc,
    catalog_service_pb2_grpc,
    generation_service_pb2_grpc,
    server_info_service_pb2_grpc,
)
from saeguard_server.admission import LoadLimiter
from saeguard_server.audit.log import Audit
from saeguard_server.caller import Call
from saeguard_server.catalog import Catalog, describe_model, describe_server
from saeguard_server.engine.protocol import Engine, GenerateTask
from saeguard_server.fair_queue import FairQueue
from saeguard_server.generation import with_request_facts
from saeguard_server.identity import auth
from saeguard_server.identity.auth import Identity
from saeguard_server.observe import Metrics
from saeguard_server.quotas import Quotas
from saeguard_server.rpc import server as edge
from saeguard_server.rpc.interceptor import AuthInterceptor, OpenCalls, RpcInterceptor
from saeguard_server.rpc.policy import PolicyServicer
from saeguard_server.rpc.server import Health, ServerInfoServicer
from saeguard_server.rpc.services import ActivationServicer, CatalogServicer, GenerationServicer
from saeguard_server.settings import IdentitySettings, LimitSettings, ServerSettings, Settings


@dataclass
class FakeGenerate:
    """Generates on the fake engine, without a tokenizer."""

    engine: Engine
    calls: list[Call] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)

    async def stream(self, request: GenerateRequest, call: Call) -> AsyncIterator[StreamChunk]:
        self.calls.append(call)
        self.requests.append(request)
        task = GenerateTask(
            call=call, tokens=(1, 2), sampling=request.sampling,
            max_new_tokens=request.sampling.max_new_tokens or 3, seed=7,
            watch=tuple((one.sae, one.feature) for one in request.watch),
        )  # fmt: skip
        async with aclosing(self.engine.generate(task)) as chunks:
            async for chunk in chunks:
                yield with_request_facts(chunk, call, None)

    async def compare(self, request: GenerateRequest, call: Call) -> Comparison:
        """Both answers are the same."""
        same = Completion(
            text="text", tokens=(Token(1),), finish_reason="length", usage=Usage(2, 1), timings=Timings(0.0, 0.0, 0.0),
            seed=7, request_id=call.request_id,
        )  # fmt: skip
        return Comparison(same, same, None, (0.0,))


@dataclass
class FakeRead:
    """One feature a token; ``tokens`` of them with ``entries`` each."""

    tokens: int = 2
    entries: int = 1
    requests: list[ActivationRequest] = field(default_factory=list)

    async def stream(self, request: ActivationRequest, call: Call) -> AsyncIterator[ActivationPart]:
        self.requests.append(request)
        total = self.tokens * self.entries
        yield ActivationPart(
            0, "mid", tuple(TokenText(index, f"w{index}", index) for index in range(self.tokens)),
            array("I", range(0, total + 1, self.entries)),
            array("I", [index % self.entries for index in range(total)]),
            array("f", [float(index) for index in range(total)]), 0, True,
        )  # fmt: skip


@dataclass
class Edge:
    """A running edge and everything a test may turn."""

    address: str
    channel: grpc.aio.Channel
    metrics: Metrics
    admission: LoadLimiter
    health: Health
    generate: FakeGenerate
    read: FakeRead
    engine: Engine
    interceptor: RpcInterceptor

    def __post_init__(self) -> None:
        self.generation = generation_service_pb2_grpc.GenerationServiceStub(self.channel)
        self.activation = activation_service_pb2_grpc.ActivationServiceStub(self.channel)
        self.catalog = catalog_service_pb2_grpc.CatalogServiceStub(self.channel)
        self.info = server_info_service_pb2_grpc.ServerInfoServiceStub(self.channel)


@pytest.fixture
def limits() -> LimitSettings:
    return LimitSettings(
        max_queue=2, max_deadline_s=5.0, max_interventions=4, max_watch=3, max_activation_inputs=2,
        max_activation_values=10,
    )  # fmt: skip


@pytest.fixture
async def running(engine: Engine, metrics: Metrics, limits: LimitSettings) -> AsyncIterator[Edge]:
    admission = LoadLimiter(
        engine, FairQueue(engine, metrics, slots=2), metrics, max_queue=limits.max_queue, max_slots=2
    )
    health, generate, read = Health(edge.SERVICES), FakeGenerate(engine), FakeRead()
    settings = Settings(limits=limits, server=ServerSettings(listen="127.0.0.1:0"))
    servicers = edge.Servicers(
        generation=GenerationServicer(generate, admission, limits),
        activation=ActivationServicer(read, admission, limits),
        catalog=CatalogServicer(Catalog(engine.saes), describe_model(engine)),
        policy=PolicyServicer(None, Audit()),
        server_info=ServerInfoServicer(describe_server(engine, settings)),
        health=health,
    )
    interceptor = RpcInterceptor(
        metrics,
        admission,
        AuthInterceptor(Identity.of(IdentitySettings()), auth.role_table(False), metrics),
        OpenCalls(settings.server.max_calls, settings.server.max_connections),
        Quotas(metrics),
        Audit(),
        limits=limits,
        receive_s=settings.server.receive_s,
    )
    server = edge.build_server(servicers, interceptor, settings.server)
    address = str(edge.listen_on(server, settings.server))
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Edge(address, channel, metrics, admission, health, generate, read, engine, interceptor)
    await server.stop(None)
    assert await interceptor.open.ended(within_s=2)
