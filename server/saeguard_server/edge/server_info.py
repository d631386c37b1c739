"""ServerInfoService."""

from __future__ import annotations

from saeguard.v1 import server_info_service_pb2 as pb
from saeguard.v1.server_info_service_pb2_grpc import ServerInfoServiceServicer
from saeguard_server.edge.wire.info import info_response
from saeguard_server.flows.info import ServerInfo


class ServerInfoServicer(ServerInfoServiceServicer):
    """Says what this server is and allows."""

    def __init__(self, info: ServerInfo) -> None:
        self._reply = info_response(info)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: object) -> pb.GetServerInfoResponse:
        """The same for as long as the server runs."""
        return self._reply
