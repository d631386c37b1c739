"""The gRPC server: services, the frame around them, health, reflection, the port."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

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
from saeguard_server.address import Address
from saeguard_server.edge.activation import ActivationServicer
from saeguard_server.edge.catalog import CatalogServicer
from saeguard_server.edge.generation import GenerationServicer
from saeguard_server.edge.health import Health
from saeguard_server.edge.interceptor import Frame
from saeguard_server.edge.policy import PolicyServicer
from saeguard_server.edge.server_info import ServerInfoServicer
from saeguard_server.edge.tls import credentials
from saeguard_server.settings import BadSettings, ServerSettings

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
    """Everything that the server serves."""

    generation: GenerationServicer
    activation: ActivationServicer
    catalog: CatalogServicer
    policy: PolicyServicer
    server_info: ServerInfoServicer
    health: Health


def build(servicers: Servicers, frame: Frame, settings: ServerSettings) -> grpc.aio.Server:
    """A server with everything registered; it has no port yet."""
    server = grpc.aio.server(interceptors=[frame], options=_options(settings))
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(servicers.generation, server)
    activation_service_pb2_grpc.add_ActivationServiceServicer_to_server(servicers.activation, server)
    catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(servicers.catalog, server)
    policy_service_pb2_grpc.add_PolicyServiceServicer_to_server(servicers.policy, server)
    server_info_service_pb2_grpc.add_ServerInfoServiceServicer_to_server(servicers.server_info, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicers.health, server)
    reflection.enable_server_reflection((*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
    return server


def listen(server: grpc.aio.Server, settings: ServerSettings) -> Address:
    """Opens the port; the address has the real one where 0 was asked for.

    Raises:
        BadSettings: the address is taken or not this machine's, or a TLS file is missing.
    """
    wanted = Address.parse(settings.listen)
    secure = credentials(settings)
    if secure is None and not wanted.is_loopback:
        LOG.warning("listening without TLS beyond this machine", extra={"fields": {"address": str(wanted)}})
    try:
        add = server.add_insecure_port(str(wanted)) if secure is None else server.add_secure_port(str(wanted), secure)
    except RuntimeError as err:
        raise BadSettings(f"server.listen: {wanted} cannot be used: it is taken or not an address of ours") from err
    return Address(wanted.host, add)


def _options(settings: ServerSettings) -> list[tuple[str, int]]:
    options = [
        # Two servers on one port would share its callers silently.
        ("grpc.so_reuseport", 0),
        # The name that the core reads; "min_recv_ping_interval" is found in much code and does nothing.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if settings.max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", round(settings.max_connection_age_s * 1000)))
    return options
