"""TLS with real certificates: who gets in, and that renewed files are used without a restart."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from saeguard.v1 import catalog_service_pb2, catalog_service_pb2_grpc
from saeguard_server import probe
from saeguard_server.settings import BadSettings

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="the openssl command makes the certificates")


def openssl(*arguments: str) -> None:
    subprocess.run([str(OPENSSL), *arguments], check=True, capture_output=True)


class Pair:
    """A self-signed certificate for localhost, and its key."""

    def __init__(self, folder: Path, name: str) -> None:
        self.cert, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-keyout", str(self.key), "-out", str(self.cert),
        )  # fmt: skip

    def credentials(self, trusts: Pair) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            trusts.cert.read_bytes(), self.key.read_bytes(), self.cert.read_bytes()
        )  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: Pair(folder, name) for name in ("server", "renewed", "client", "stranger")}


async def model(port: int, credentials: grpc.ChannelCredentials) -> str:
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        stub = catalog_service_pb2_grpc.CatalogServiceStub(channel)
        return (await stub.GetModel(catalog_service_pb2.GetModelRequest(), timeout=3)).name


async def shown(port: int) -> bytes:
    """The certificate that the server shows, as PEM without spaces."""
    pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
    return pem.encode().strip()


async def test_only_tls_is_spoken_and_renewed_files_are_shown(app_with: Any, pairs: Any, tmp_path: Path) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    shutil.copy(pairs["server"].cert, cert)
    shutil.copy(pairs["server"].key, key)
    async with app_with(server={"tls_certificate": str(cert), "tls_key": str(key)}) as app:
        trust = grpc.ssl_channel_credentials(pairs["server"].cert.read_bytes())
        assert await model(app.port, trust) == "fake"
        async with grpc.aio.insecure_channel(f"localhost:{app.port}") as plain:
            stub = catalog_service_pb2_grpc.CatalogServiceStub(plain)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetModel(catalog_service_pb2.GetModelRequest(), timeout=3)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await shown(app.port) == pairs["server"].cert.read_bytes().strip()
        shutil.copy(pairs["renewed"].cert, cert)
        shutil.copy(pairs["renewed"].key, key)
        assert await shown(app.port) == pairs["renewed"].cert.read_bytes().strip()
        key.unlink()
        assert await shown(app.port) == pairs["renewed"].cert.read_bytes().strip()


async def test_with_a_client_authority_only_its_clients_get_in(app_with: Any, pairs: Any) -> None:
    server, client = pairs["server"], pairs["client"]
    tls = {"tls_certificate": str(server.cert), "tls_key": str(server.key), "tls_client_ca": str(client.cert)}
    async with app_with(server=tls) as app:
        assert await model(app.port, client.credentials(server)) == "fake"
        nobody = grpc.ssl_channel_credentials(server.cert.read_bytes())
        for refused in (nobody, pairs["stranger"].credentials(server)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await model(app.port, refused)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await asyncio.sleep(0.3)
        flags = ["--ca", str(server.cert), "--cert", str(client.cert), "--key", str(client.key)]
        assert await asyncio.to_thread(probe.main, [f"localhost:{app.port}", *flags]) == 0
        assert await asyncio.to_thread(probe.main, [f"localhost:{app.port}", *flags[:2]]) == 1


async def test_a_file_that_is_not_there_is_named(app_with: Any, pairs: Any, tmp_path: Path) -> None:
    tls = {"tls_certificate": str(tmp_path / "none.pem"), "tls_key": str(pairs["server"].key)}
    with pytest.raises(BadSettings, match=r"none\.pem"):
        async with app_with(server=tls):
            pass


async def test_files_that_are_no_certificate_are_refused(app_with: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("not a certificate")
    with pytest.raises(BadSettings):
        async with app_with(server={"tls_certificate": str(bad), "tls_key": str(bad)}):
            pass


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01", b"\x16\x03\x01\x00\xff" + b"\0" * 20, b"PRI * HTTP/2.0"])
async def test_a_handshake_that_does_not_go_on_is_ended(app_with: Any, pairs: dict[str, Pair], first: bytes) -> None:
    files = {"tls_certificate": str(pairs["server"].cert), "tls_key": str(pairs["server"].key)}
    async with app_with(server=files | {"handshake_s": 0.5}) as app:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
        writer.write(first)
        async with asyncio.timeout(3):
            while await reader.read(1024):
                pass
        writer.close()


async def test_files_that_do_not_belong_together_are_refused(app_with: Any, pairs: dict[str, Pair]) -> None:
    with pytest.raises(BadSettings, match=r"server\.tls_\*: .*server\.pem"):
        async with app_with(server={"tls_certificate": str(pairs["server"].cert), "tls_key": str(pairs["client"].key)}):
            pass
