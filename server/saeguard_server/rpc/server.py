"""The gRPC server: its services, interceptor, health, reflection, TLS, the port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from saeguard.catalog import ServerInfo
from saeguard.v1 import (
    activation_service_pb2,
    activation_service_pb2_grpc,
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    generation_service_pb2,
    generation_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
    server_info_service_pb2,
    server_info_service_pb2_grpc,
)
from saeguard.v1 import server_info_service_pb2 as pb
from saeguard.v1.server_info_service_pb2_grpc import ServerInfoServiceServicer
from saeguard.wire import to_message
from saeguard_server.errors import UnknownName
from saeguard_server.rpc.interceptor import RpcInterceptor
from saeguard_server.rpc.policy import PolicyServicer
from saeguard_server.rpc.services import ActivationServicer, CatalogServicer, GenerationServicer
from saeguard_server.settings import Address, BadSettings, ServerSettings, WatchedFiles

LOG = logging.getLogger("saeguard.server")

SERVICES: tuple[str, ...] = tuple(
    service.full_name
    for file in (
        generation_service_pb2.DESCRIPTOR,
        activation_service_pb2.DESCRIPTOR,
        catalog_service_pb2.DESCRIPTOR,
        policy_service_pb2.DESCRIPTOR,
        server_info_service_pb2.DESCRIPTOR,
    )
    for service in file.services_by_name.values()
)

HEALTH_SERVICE: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Servicers:
    generation: GenerationServicer
    activation: ActivationServicer
    catalog: CatalogServicer
    policy: PolicyServicer
    server_info: ServerInfoServicer
    health: Health


def build_server(servicers: Servicers, interceptor: RpcInterceptor, settings: ServerSettings) -> grpc.aio.Server:
    server = grpc.aio.server(interceptors=[interceptor], options=_options(settings, interceptor.max_message_bytes))
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(servicers.generation, server)
    activation_service_pb2_grpc.add_ActivationServiceServicer_to_server(servicers.activation, server)
    catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(servicers.catalog, server)
    policy_service_pb2_grpc.add_PolicyServiceServicer_to_server(servicers.policy, server)
    server_info_service_pb2_grpc.add_ServerInfoServiceServicer_to_server(servicers.server_info, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicers.health, server)
    reflection.enable_server_reflection((*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
    return server


def listen_on(server: grpc.aio.Server, settings: ServerSettings) -> Address:
    """Opens the port; 0 takes a free one. Raises BadSettings: the address or a TLS file cannot be used."""
    address = Address.parse(settings.listen)
    tls = server_credentials(settings)
    if tls is None and not address.is_loopback:
        LOG.warning("listening without TLS beyond this machine", extra={"fields": {"address": str(address)}})
    try:
        port = server.add_insecure_port(str(address)) if tls is None else server.add_secure_port(str(address), tls)
    except RuntimeError as err:
        raise BadSettings(f"server.listen: {address} cannot be used: it is taken or not an address of ours") from err
    return Address(address.host, port)


def _options(settings: ServerSettings, max_message_bytes: int) -> list[tuple[str, int]]:
    options = [
        # Two servers on one port would share its callers silently.
        ("grpc.so_reuseport", 0),
        # The name that the core reads; "min_recv_ping_interval" is found in much code and does nothing.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]
    if settings.max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", round(settings.max_connection_age_s * 1000)))
    return options


# --- TLS


def server_credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    """What the settings ask for; None is plain text. Files are read again when they change: certificates are renewed.

    Raises:
        BadSettings: a file cannot be read.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    files = [Path(settings.tls_key), Path(settings.tls_certificate)]
    files += [Path(settings.tls_client_ca)] if settings.tls_client_ca is not None else []

    def read() -> grpc.ServerCertificateConfiguration:
        key, certificate, *authorities = (file.read_bytes() for file in files)
        roots = authorities[0] if authorities else None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=roots)

    try:
        watched = WatchedFiles("TLS files", files, read)
    except OSError as err:
        raise BadSettings(f"server.tls_*: {err.filename}: {err.strerror}") from err
    served = watched.current()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Called at each handshake; None goes on with what is served."""
        nonlocal served
        if watched.current() is served:
            return None
        served = watched.current()
        return served

    return grpc.dynamic_ssl_server_credentials(
        served,
        renewed,  # type: ignore[arg-type]  # None is allowed
        require_client_authentication=settings.tls_client_ca is not None,
    )


# --- Health and ServerInfo


OVERALL = ""
LIVENESS = "liveness"
"""SERVING for as long as the process answers, so that a draining server is not killed for being unready."""

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

POLL_S = 0.25


class Health(health_pb2_grpc.HealthServicer):
    """Answers for the server as a whole, for ``liveness``, and for each service by its full name.

    Not grpc_health's own aio servicer: there, a Watch that ends forgets the other watchers of its service, and one that
    does not read holds the lock that setting a status needs.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._status: dict[str, int] = dict.fromkeys([OVERALL, *services], NOT_SERVING) | {LIVENESS: SERVING}
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: object) -> health_pb2.HealthCheckResponse:
        if request.service not in self._status:
            raise UnknownName("service", "is not a service of this server")
        return health_pb2.HealthCheckResponse(status=self._status[request.service])

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: object
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
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
        while True:
            self.set_ready(is_ready())
            await asyncio.sleep(POLL_S)


class ServerInfoServicer(ServerInfoServiceServicer):
    def __init__(self, info: ServerInfo) -> None:
        self._reply = to_message(pb.GetServerInfoResponse, info)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: object) -> pb.GetServerInfoResponse:
        return self._reply
