"""The issuer's keys: from a file that changes, from a URL that is slow, wrong, gone, or asked too often."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from saeguard_server.errors import Unavailable
from saeguard_server.identity import oidc
from saeguard_server.identity.oidc import JwksFile, JwksUrl, open_jwks, public_keys
from saeguard_server.settings import BadSettings, JwtSettings
from support.credentials import AUDIENCE, ISSUER, ec_key, jwk, rsa_key


class Issuer:
    """Counts how often it is asked; what a test sets is what it answers."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, 0
        self.document: Any = {"keys": [jwk(rsa_key(), "one")]}
        self.gate: threading.Event | None = None
        self.keys = JwksUrl(self.fetch, 300.0, 3600.0, lambda: self.now)

    def fetch(self) -> Any:
        self.asked += 1
        if self.gate is not None:
            assert self.gate.wait(5)
        if isinstance(self.document, Exception):
            raise self.document
        return self.document


async def test_a_url_is_asked_once_for_what_is_known() -> None:
    issuer = Issuer()
    found = await asyncio.gather(*(issuer.keys.find("one") for _ in range(20)))
    assert all(found)
    assert issuer.asked == 1
    assert await issuer.keys.find(None) is not None, "the only key, for a token that names none"


async def test_made_up_ids_do_not_make_us_ask_more_often() -> None:
    issuer = Issuer()
    for number in range(100):
        assert await issuer.keys.find(f"made-up-{number}") is None
        issuer.now += 0.2
    assert issuer.asked == 2
    issuer.document = {"keys": [jwk(rsa_key(), "one"), jwk(ec_key(), "new")]}
    issuer.now += oidc.MIN_REFRESH_S
    assert await issuer.keys.find("new") is not None


async def test_withdrawn_keys_are_forgotten_and_nobody_waits_for_it() -> None:
    issuer = Issuer()
    assert await issuer.keys.find("one") is not None
    issuer.document, issuer.gate = {"keys": [jwk(ec_key(), "two")]}, threading.Event()
    issuer.now += 301.0
    async with asyncio.timeout(1):
        assert await issuer.keys.find("one") is not None
    issuer.gate.set()
    async with asyncio.timeout(5):
        while await issuer.keys.find("one") is not None:
            await asyncio.sleep(0.005)
    assert await issuer.keys.find("two") is not None


@pytest.mark.parametrize("wrong", [OSError("down"), {"keys": []}, [], None, {"keys": [{"kty": "oct", "k": "AA"}]}])
async def test_an_issuer_that_fails_is_trusted_as_it_was_for_a_while(wrong: Any) -> None:
    issuer = Issuer()
    assert await issuer.keys.find("one") is not None
    issuer.document = wrong
    issuer.now += 3000.0
    assert await issuer.keys.find("one") is not None
    issuer.now += 3000.0
    with pytest.raises(Unavailable):
        await issuer.keys.find("one")
    assert 2 <= issuer.asked <= 3


async def test_an_issuer_that_never_answered() -> None:
    issuer = Issuer()
    issuer.document = OSError("down")
    for _ in range(3):
        with pytest.raises(Unavailable, match="cannot be read"):
            await issuer.keys.find("one")
    assert issuer.asked == 1


def test_only_public_keys_for_signatures_count() -> None:
    private = jwk(rsa_key(), "private") | {"d": "AQAB"}
    secret = {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"}
    unknown = {"kty": "EC", "crv": "P-1", "x": "AA", "y": "AA", "kid": "unknown"}
    encrypting = jwk(rsa_key(), "encrypting", use="enc")
    found = public_keys({"keys": [private, secret, unknown, encrypting, jwk(ec_key(), "good"), 3]})
    assert found.keys() == {"good", None}
    with pytest.raises(ValueError, match="no public key"):
        public_keys({"keys": [private, secret, unknown, encrypting]})
    with pytest.raises(ValueError, match="twice"):
        public_keys({"keys": [jwk(ec_key(), "a"), jwk(rsa_key(), "a")]})
    with pytest.raises(ValueError, match="more than 256"):
        public_keys({"keys": [jwk(ec_key(), str(index)) for index in range(oidc.MAX_KEYS + 1)]})
    with pytest.raises(ValueError, match="no string"):
        public_keys({"keys": [jwk(ec_key(), "a") | {"kid": ["a"]}]})


async def test_a_file_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [jwk(rsa_key(), "one")]}))
    keys = JwksFile(path)
    path.write_text(json.dumps({"keys": [jwk(ec_key(), "two")]}))
    assert (await keys.find("one"), await keys.find("two") is not None) == (None, True)
    for spoilt in ("{", '{"keys": []}'):
        path.write_text(spoilt)
        assert await keys.find("two") is not None
    path.unlink()
    assert await keys.find("two") is not None
    assert caplog.text.count("token keys cannot be read, the old ones stay") == 3


@pytest.mark.parametrize("text", [None, "", "{}", '{"keys": [{"kty": "oct", "k": "AA"}]}'])
def test_at_the_start_the_file_must_be_right(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "jwks.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadSettings, match=r"identity\.jwt\.jwks"):
        JwksFile(path)


@contextmanager
def http(document: Any) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/jwks.json"
    server.shutdown()
    thread.join()
    server.server_close()


async def test_over_http() -> None:
    with http({"keys": [jwk(rsa_key(), "one")]}) as url:
        keys = open_jwks(JwtSettings(issuer=ISSUER, audience=AUDIENCE, jwks=url))
        assert await keys.find("one") is not None
    gone = open_jwks(JwtSettings(issuer=ISSUER, audience=AUDIENCE, jwks=url))
    with pytest.raises(Unavailable):
        await gone.find("one")
