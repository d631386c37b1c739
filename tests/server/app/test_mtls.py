"""Callers known by certificate, on a real socket: SPIFFE ids, foreign authorities, and authorities that are renewed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from saeguard.v1 import catalog_service_pb2 as pb
from saeguard.v1 import catalog_service_pb2_grpc
from saeguard_server.caller import Role
from support.credentials import Certified, bearer, certified, write_keys

SPIFFE = "spiffe://example.org/ns/prod/sa/reader"


@pytest.fixture(scope="module")
def authority() -> Certified:
    return certified("authority")


@pytest.fixture
def tables(authority: Certified, tmp_path: Path) -> dict[str, Any]:
    """A server with a certificate, which asks for one; readers may observe, writers may not."""
    certificate, key = certified("server", authority).write(tmp_path, "server")
    client_ca, _ = authority.write(tmp_path, "clients")
    certificates = [
        {"id": SPIFFE, "name": "reader", "roles": ["observe"]},
        {"id": "writer.example.org", "name": "writer", "roles": ["generate"]},
    ]
    server = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": client_ca, "metrics_listen": ""}
    return {"server": server, "identity": {"certificates": certificates}}


async def model(port: int, credentials: grpc.ChannelCredentials, **more: Any) -> str:
    """The model's name, or how the call ended. A new connection each time."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
        try:
            stub = catalog_service_pb2_grpc.CatalogServiceStub(channel)
            return (await stub.GetModel(pb.GetModelRequest(), timeout=3, **more)).name
        except grpc.aio.AioRpcError as err:
            return f"{err.code().name}: {err.details()}"


async def test_a_certificate_is_its_caller(app_with: Any, authority: Certified, tables: Any) -> None:
    reader = certified("any", authority, uris=[SPIFFE])
    writer = certified("any", authority, dns=["writer.example.org"])
    two_uris = certified("any", authority, uris=[SPIFFE, "https://example.org"])
    stranger = certified("reader", authority)
    foreign_authority = certified("authority")
    foreign = certified("any", foreign_authority, uris=[SPIFFE])
    async with app_with(**tables) as app:
        assert await model(app.port, reader.channel(authority)) == "fake"
        assert "needs the role observe, which writer has not" in await model(app.port, writer.channel(authority))
        for unknown in (stranger, two_uris):
            assert "UNAUTHENTICATED: who calls?" in await model(app.port, unknown.channel(authority))
        # Not even a connection.
        assert (await model(app.port, foreign.channel(authority))).startswith("UNAVAILABLE")
        nothing = grpc.ssl_channel_credentials(authority.certificate)
        assert (await model(app.port, nothing)).startswith("UNAVAILABLE")


async def test_a_certificate_and_a_key_are_one_too_many(
    app_with: Any, authority: Certified, tables: Any, tmp_path: Path
) -> None:
    key = write_keys(tmp_path / "keys.json", robot=[Role.OBSERVE])["robot"]
    tables["identity"]["api_keys"] = str(tmp_path / "keys.json")
    reader = certified("any", authority, uris=[SPIFFE]).channel(authority)
    stranger = certified("sidecar", authority).channel(authority)
    async with app_with(**tables) as app:
        assert "more than one credential" in await model(app.port, reader, metadata=bearer(key))
        assert await model(app.port, stranger, metadata=bearer(key)) == "fake"


async def test_authorities_and_certificates_are_renewed_without_a_restart(
    app_with: Any, authority: Certified, tables: Any, tmp_path: Path
) -> None:
    reader = certified("any", authority, uris=[SPIFFE])
    other = certified("next authority")
    next_reader = certified("any", other, uris=[SPIFFE])
    async with app_with(**tables) as app:
        assert await model(app.port, reader.channel(authority)) == "fake"
        assert (await model(app.port, next_reader.channel(authority))).startswith("UNAVAILABLE")
        other.write(tmp_path, "clients")
        assert await model(app.port, next_reader.channel(authority)) == "fake"
        assert (await model(app.port, reader.channel(authority))).startswith("UNAVAILABLE"), "no longer trusted"
        certified("server", other).write(tmp_path, "server")
        assert await model(app.port, next_reader.channel(other)) == "fake"
        # Half a renewal: a certificate whose key is not there yet. What was there goes on.
        (tmp_path / "server.pem").write_bytes(certified("server", other).certificate)
        assert await model(app.port, next_reader.channel(other)) == "fake"
