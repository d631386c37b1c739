"""JwtAuthenticator: every way in which one is not right, and what its claims become."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from saeguard_server.caller import Credentials, Quota, Role
from saeguard_server.errors import Unauthenticated
from saeguard_server.identity.oidc import JwksFile, JwtAuthenticator
from saeguard_server.settings import JwtSettings
from support.credentials import AUDIENCE, ISSUER, ec_key, forged, jwk, rsa_key, token


@pytest.fixture
def jwks(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    keys = [jwk(rsa_key(), "one"), jwk(ec_key(), "two"), jwk(rsa_key(1), "three", alg="RS512")]
    path.write_text(json.dumps({"keys": keys}))
    return path


def opened(jwks: Path, **more: Any) -> JwtAuthenticator:
    settings = JwtSettings(issuer=ISSUER, audience=AUDIENCE, jwks=str(jwks), **more)
    return JwtAuthenticator(settings, JwksFile(jwks), lambda name: Quota(max_concurrent=len(name)))


def shown(text: str) -> Credentials:
    return Credentials(authorization=(f"Bearer {text}",))


async def refused(tokens: JwtAuthenticator, text: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await tokens.caller(shown(text))
    assert caught.value.__cause__ is None
    assert text not in caught.value.message or text == ""
    return caught.value.message.removeprefix("the token is refused: ")


async def test_a_right_token_is_its_caller(jwks: Path) -> None:
    tokens = opened(jwks)
    caller = await tokens.caller(shown(token(roles=["generate", "steer", "unheard-of"])))
    assert (caller.name, caller.roles, caller.tags) == ("jwt:alice", {Role.GENERATE, Role.STEER}, frozenset())
    assert caller.quota == Quota(max_concurrent=9)
    assert (await tokens.caller(shown(token(ec_key(), "two", "ES256")))).name == "jwt:alice"
    assert (await tokens.caller(shown(token(aud=["other", AUDIENCE])))).name == "jwt:alice"


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"exp": int(time.time()) - 3600}, "it has expired"),
        ({"nbf": int(time.time()) + 3600}, "it is not valid yet"),
        ({"iat": int(time.time()) + 3600}, "it is not valid yet"),
        ({"aud": "another"}, "it is for another audience"),
        ({"aud": None}, "a claim is missing"),
        ({"iss": "https://evil.example.org"}, "it is from another issuer"),
        ({"iss": None}, "a claim is missing"),
        ({"exp": None}, "a claim is missing"),
        ({"sub": None}, "its claim sub is no name"),
        ({"sub": "a\nb"}, "its claim sub is no name"),
        ({"sub": "x" * 300}, "its claim sub is no name"),
    ],
)
async def test_claims_that_are_not_right(jwks: Path, claims: dict[str, Any], said: str) -> None:
    assert await refused(opened(jwks), token(**claims)) == said


async def test_a_conversation_is_taken_from_a_claim_where_the_settings_name_one(jwks: Path) -> None:
    assert (await opened(jwks).caller(shown(token(sid="one")))).conversation is None
    tokens = opened(jwks, conversation_claim="sid")
    assert (await tokens.caller(shown(token(sid="one")))).conversation == "one"
    assert (await tokens.caller(shown(token()))).conversation == "", "none, and the caller cannot choose one"
    for wrong in (7, ["one"], "", "x" * 257, "a\nb", "\ud800"):
        assert await refused(tokens, token(sid=wrong)) == "its claim sid is no conversation of 1 to 256 characters"


async def test_clocks_may_differ_by_the_leeway(jwks: Path) -> None:
    late = token(exp=int(time.time()) - 20)
    assert (await opened(jwks).caller(shown(late))).name == "jwt:alice"
    assert await refused(opened(jwks, leeway_s=5.0), late) == "it has expired"


async def test_a_token_without_a_signature_is_refused(jwks: Path) -> None:
    unaccepted = "it is not signed by an algorithm that is accepted here"
    for algorithm in ("none", "None", "nOnE", ""):
        assert await refused(opened(jwks), forged(algorithm, b"")) == unaccepted
    parts = token().split(".")
    assert await refused(opened(jwks), f"{parts[0]}.{parts[1]}.") == "its signature is wrong"


async def test_a_public_key_is_no_secret(jwks: Path) -> None:
    """Whoever knows the public key, and that is everybody, must not be able to sign with it."""
    public = rsa_key().public_key()
    for encoding, form in (
        (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.DER, serialization.PublicFormat.PKCS1),
    ):
        secret = public.public_bytes(encoding, form)
        for algorithm in ("HS256", "HS384", "RS256"):
            said = await refused(opened(jwks), forged(algorithm, secret))
            assert said in ("it is not signed by an algorithm that is accepted here", "its signature is wrong")


async def test_keys_that_the_issuer_does_not_have(jwks: Path) -> None:
    tokens = opened(jwks)
    assert "does not have" in await refused(tokens, token(kid="four"))
    assert "does not have" in await refused(tokens, token(kid=None)), "one of three, and nothing says which"
    assert await refused(tokens, token(rsa_key(2))) == "its signature is wrong"
    assert await refused(tokens, token(ec_key(), "one", "ES256")) == "it is not a token that can be read"
    assert "does not have" in await refused(tokens, token(rsa_key(1), "three")), "that key is for RS512"


async def test_only_algorithms_of_the_settings(jwks: Path) -> None:
    tokens = opened(jwks, algorithms=("ES256",))
    assert "algorithm" in await refused(tokens, token())
    assert (await tokens.caller(shown(token(ec_key(), "two", "ES256")))).name == "jwt:alice"


@pytest.mark.parametrize(
    "text", ["", "x", "a.b.c", "..", "ey" * 4000, token() + "x" * 3, "=" * 30, token().replace(".", ". ")]
)
async def test_what_is_no_token(jwks: Path, text: str) -> None:
    assert await refused(opened(jwks), text)


async def test_changed_claims_break_the_signature(jwks: Path) -> None:
    head, _, signature = token().split(".")
    body = token(roles=["admin"]).split(".")[1]
    assert await refused(opened(jwks), f"{head}.{body}.{signature}") == "its signature is wrong"


@pytest.mark.parametrize(
    ("settings", "claims", "roles"),
    [
        ({}, {"roles": "generate observe"}, {Role.GENERATE, Role.OBSERVE}),
        ({}, {"roles": None}, set()),
        ({}, {"roles": {"admin": True}}, set()),
        ({}, {"roles": [["admin"], 3, "observe"]}, {Role.OBSERVE}),
        ({"roles_claim": "realm_access.roles"}, {"realm_access": {"roles": ["admin"]}}, {Role.ADMIN}),
        ({"roles_claim": "https://x.org/roles"}, {"https://x.org/roles": ["steer"]}, {Role.STEER}),
        ({"roles_prefix": "saeguard:"}, {"roles": ["saeguard:generate", "admin"]}, {Role.GENERATE}),
    ],
)
async def test_roles_are_where_the_settings_say(
    jwks: Path, settings: dict[str, Any], claims: dict[str, Any], roles: set[Role]
) -> None:
    assert (await opened(jwks, **settings).caller(shown(token(**claims)))).roles == roles


async def test_name_and_tags(jwks: Path) -> None:
    tokens = opened(jwks, name_claim="email", name_prefix="", tags_claim="groups")
    caller = await tokens.caller(shown(token(email="alice@example.org", groups=["red", "blue"])))
    assert (caller.name, caller.tags) == ("alice@example.org", {"red", "blue"})


async def test_a_short_key_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    short = rsa.generate_private_key(65537, 1024)
    path.write_text(json.dumps({"keys": [jwk(short, "short"), jwk(rsa_key(), "one")]}))
    with pytest.warns(match="below the minimum"):
        weak = token(short, "short")
    assert "does not have" in await refused(opened(path), weak)
