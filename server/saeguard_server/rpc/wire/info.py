"""ServerInfo as a message."""

from __future__ import annotations

from dataclasses import asdict

from saeguard.v1 import server_info_service_pb2 as pb
from saeguard_server.catalog import ServerInfo


def info_response(info: ServerInfo) -> pb.GetServerInfoResponse:
    """What this server is and allows."""
    return pb.GetServerInfoResponse(
        version=info.version,
        engine=info.engine,
        model=info.model,
        limits=pb.Limits(**asdict(info.limits)),
        intervention_kinds=info.intervention_kinds,
        conditions=info.conditions,
    )
