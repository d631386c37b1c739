"""Which credential counts, what two of them are, certificates' names, and who everybody is where nobody is asked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from saeguard_server.caller import Caller, Credentials, Quota, Role
from saeguard_server.errors import Unauthenticated
from saeguard_server.identity.auth import Identity
from saeguard_server.settings import BadSettings, CertificateSettings, IdentitySettings, JwtSettings, load_settings
from support.credentials import AUDIENCE, ISSUER, write_keys

SPIFFE = "spiffe://example.org/ns/prod/sa/billing"
BILLING = CertificateSettings(id=SPIFFE, name="billing", roles=(Role.GENERATE,), tags=("prod",))
WEB = CertificateSettings(id="web.example.org", name="web", roles=(Role.OBSERVE,))


def identity(path: Path | None = None, **more: Any) -> Identity:
    given = {"certificates": (BILLING, WEB), "api_keys": str(path) if path is not None else None} | more
    return Identity.of(IdentitySettings(**given))


async def refused(one: Identity, credentials: Credentials) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await one.caller(credentials)
    return caught.value.message


async def test_a_certificate_is_known_by_its_names() -> None:
    one = identity(quotas={"billing": Quota(max_concurrent=3)})
    billing = await one.caller(Credentials(spiffe_id=SPIFFE, uris=(SPIFFE,), dns=("anything",)))
    assert billing == Caller("billing", frozenset({Role.GENERATE}), frozenset({"prod"}), Quota(max_concurrent=3))
    assert (await one.caller(Credentials(dns=("localhost", "web.example.org")))).name == "web"


@pytest.mark.parametrize(
    "credentials",
    [
        Credentials(),
        Credentials(dns=(SPIFFE,)),
        Credentials(uris=("web.example.org",)),
        Credentials(uris=(SPIFFE, "spiffe://example.org/other")),
        Credentials(spiffe_id=f"{SPIFFE}/more", uris=(f"{SPIFFE}/more",)),
        Credentials(dns=("evil.web.example.org", "web.example.org.evil.com", "*.example.org")),
    ],
)
async def test_other_names_are_nobody(credentials: Credentials) -> None:
    assert "who calls? This server wants a client certificate" in await refused(identity(), credentials)


async def test_a_certificate_with_two_callers_names_is_refused() -> None:
    both = Credentials(spiffe_id=SPIFFE, uris=(SPIFFE,), dns=("web.example.org",))
    assert "more than one caller" in await refused(identity(), both)


async def test_exactly_one_credential_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = write_keys(path, robot=[Role.GENERATE])["robot"]
    one = identity(path)
    right = f"Bearer {key}"
    assert (await one.caller(Credentials(authorization=(right,)))).name == "robot"
    assert (await one.caller(Credentials(authorization=(f"bearer {key}",)))).name == "robot"
    unknown = Credentials(authorization=(right,), dns=("sidecar.mesh",))
    assert (await one.caller(unknown)).name == "robot", "that certificate only opened the connection"
    for credentials in (
        Credentials(authorization=(right, right)),
        Credentials(authorization=(right, "Bearer x.y.z")),
        Credentials(authorization=(right,), dns=("web.example.org",)),
        Credentials(authorization=("Basic eDp5",), dns=("web.example.org",)),
    ):
        assert "more than one credential" in await refused(one, credentials)


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Basic eDp5", "sg_0123", "Bearer x.y.z", "Bearer  sg_x"])
async def test_other_authorization_is_none(tmp_path: Path, value: str) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, robot=[Role.GENERATE])
    said = await refused(identity(path), Credentials(authorization=(value,)))
    assert 'or "authorization: Bearer sg_..."' in said


async def test_where_nobody_is_asked_everybody_is_one_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    local = await Identity.of(IdentitySettings()).caller(Credentials(authorization=("Bearer whatever",)))
    assert (local.name, local.roles) == ("local", frozenset(Role))
    anonymous = await Identity.of(IdentitySettings(allow_anonymous=True)).caller(Credentials())
    assert (anonymous.name, anonymous.roles) == ("anonymous", {Role.GENERATE, Role.OBSERVE, Role.STEER})
    assert [(one.levelname, one.message) for one in caplog.records] == [
        ("INFO", "nobody is asked who calls"), ("WARNING", "nobody is asked who calls")
    ]  # fmt: skip


def test_credentials_do_not_print() -> None:
    assert "secret" not in repr(Credentials(authorization=("Bearer secret",)))


TLS = {"tls_certificate": "c", "tls_key": "k", "tls_client_ca": "ca"}
CERTIFICATE = {"id": "a.b", "name": "a", "roles": ["generate"]}
JWT = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": "/jwks.json"}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"server": {"listen": "0.0.0.0:1"}}, "identity.api_keys"),
        ({"server": {"listen": "[::]:1"}}, "identity.allow_anonymous = true"),
        ({"identity": {"certificates": [CERTIFICATE]}}, "server.tls_client_ca"),
        ({"identity": {"certificates": [CERTIFICATE, CERTIFICATE]}, "server": TLS}, "given twice"),
        ({"identity": {"api_keys": "k", "allow_anonymous": True}}, "contradicts"),
        ({"identity": {"jwt": JWT | {"algorithms": ["HS256"]}}}, "identity.jwt.algorithms"),
        ({"identity": {"jwt": JWT | {"algorithms": ["none"]}}}, "identity.jwt.algorithms"),
        ({"identity": {"jwt": JWT | {"algorithms": []}}}, "algorithms"),
        ({"identity": {"jwt": JWT | {"jwks": "http://login.example.org/keys"}}}, "https"),
        ({"identity": {"jwt": JWT | {"jwks_max_age_s": 5}}}, "jwks_max_age_s"),
        ({"identity": {"jwt": {"issuer": ISSUER, "jwks": "x"}}}, "audience"),
        ({"identity": {"quotas": {"a": {"max_tokens": 3}}}}, "max_tokens"),
        ({"identity": {"quota": {"max_concurrent": 0}}}, "identity.quota.max_concurrent"),
        ({"identity": {"certificates": [CERTIFICATE | {"roles": ["root"]}]}}, "roles"),
    ],
)
def test_settings_that_cannot_be(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSettings) as caught:
        load_settings(None, tree)
    assert said in str(caught.value)


def test_settings_that_can(tmp_path: Path) -> None:
    server = {"listen": "0.0.0.0:1"}
    for table in ({"api_keys": "/keys.json"}, {"jwt": JWT}, {"allow_anonymous": True}):
        load_settings(None, {"server": server, "identity": table})
    load_settings(None, {"server": server | TLS, "identity": {"certificates": [CERTIFICATE]}})
    assert JwtSettings(**JWT | {"jwks": "http://127.0.0.1:1/x"}).is_remote  # type: ignore[arg-type]
