"""The issuer's public keys, by their key id: from a file that is followed, or from a URL that is asked now and then."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK, PyJWKClient
from jwt.exceptions import PyJWTError

from saeguard_server.caller import Caller, Quota, Role
from saeguard_server.errors import Unauthenticated, Unavailable
from saeguard_server.identity.api_keys import PREFIX, Presented
from saeguard_server.settings import BadSettings, JwtSettings
from saeguard_server.watched import Stamp, stamp

LOG = logging.getLogger("saeguard.identity")

FETCH_TIMEOUT_S = 5.0
MIN_REFRESH_S = 10.0
"""Tokens with made-up key ids must not make us ask the issuer more often than this."""
MIN_RSA_BITS = 2048
_KINDS = ("RSA", "EC", "OKP")


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key and the one algorithm that it is for, where its issuer says so."""

    key: Any
    algorithm: str | None


Keys = Mapping[str | None, PublicKey]
"""By key id; under None is the only key of a set, for tokens without one."""


class Jwks(Protocol):
    """Where the keys are."""

    async def find(self, kid: str | None) -> PublicKey | None:
        """The key of that id; None where the issuer has none.

        Raises:
            Unavailable: the keys cannot be had.
        """
        ...


def open_jwks(settings: JwtSettings) -> Jwks:
    """The keys of these settings.

    Raises:
        BadSettings: the file cannot be used. A URL is asked when the first token comes.
    """
    if not settings.is_remote:
        return JwksFile(Path(settings.jwks))
    client = PyJWKClient(settings.jwks, cache_jwk_set=False, timeout=FETCH_TIMEOUT_S)
    return JwksUrl(client.fetch_data, settings.jwks_refresh_s, settings.jwks_max_age_s)


class JwksFile:
    """Read again when it changes; what cannot be read or understood changes nothing, but at the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        try:
            self._keys = self._read()
        except (OSError, ValueError) as err:
            raise BadSettings(f"identity.jwt.jwks: {path}: {_said(err)}") from err

    async def find(self, kid: str | None) -> PublicKey | None:
        """The key of that id."""
        now = self._stamp()
        if now != self._seen:
            self._seen = now
            try:
                self._keys = self._read()
                LOG.info("token keys read again", extra={"fields": {"keys": len(self._keys)}})
            except (OSError, ValueError) as err:
                LOG.error("token keys cannot be read, the old ones stay", extra={"fields": {"problem": _said(err)}})
        return self._keys.get(kid)

    def _read(self) -> Keys:
        return public_keys(json.loads(self._path.read_bytes()))

    def _stamp(self) -> Stamp | None:
        try:
            return stamp([self._path])
        except OSError:
            return None


class JwksUrl:
    """Asked off the event loop, by one at a time, and not too often."""

    def __init__(
        self,
        fetch: Callable[[], Any],
        refresh_s: float,
        max_age_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch, self._refresh_s, self._max_age_s, self._clock = fetch, refresh_s, max_age_s, clock
        self._keys: Keys = {}
        self._asked = self._got = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def find(self, kid: str | None) -> PublicKey | None:
        """The key of that id. Asks for one that is not known; known ones are renewed while they are used."""
        is_fresh = self._clock() - self._got < self._max_age_s
        asking = self._ask(kid)
        if asking is not None and not (kid in self._keys and is_fresh):
            await asyncio.shield(asking)
        if self._clock() - self._got >= self._max_age_s:
            raise Unavailable("the issuer's keys cannot be read", retry_after_s=MIN_REFRESH_S)
        return self._keys.get(kid)

    def _ask(self, kid: str | None) -> asyncio.Task[None] | None:
        if self._asking is not None:
            return self._asking
        now = self._clock()
        is_wanted = kid not in self._keys or now - self._got >= self._refresh_s
        if is_wanted and now - self._asked >= MIN_REFRESH_S:
            self._asked = now
            self._asking = asyncio.create_task(self._renew())
        return self._asking

    async def _renew(self) -> None:
        try:
            keys = public_keys(await asyncio.to_thread(self._fetch))
        except (OSError, ValueError, PyJWTError) as err:
            LOG.warning("token keys cannot be read, the old ones stay", extra={"fields": {"problem": _said(err)}})
        else:
            self._keys, self._got = keys, self._clock()
        finally:
            self._asking = None


def public_keys(document: Any) -> Keys:
    """The keys of a JWK set (RFC 7517) that can check a signature; others, such as shared secrets, are left out.

    Raises:
        ValueError: it is no such set, or no key of it can.
    """
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("is no JWK set")
    found: dict[str | None, PublicKey] = {}
    for one in document["keys"]:
        if isinstance(one, dict) and (key := _public_key(one)) is not None:
            kid = one.get("kid")
            if not isinstance(kid, str | None):
                raise ValueError("a key id is no string")
            if kid in found:
                raise ValueError("a key id is given twice")
            found[kid] = key
    if not found:
        raise ValueError("holds no public key for signatures")
    if len(found) == 1:
        found[None] = next(iter(found.values()))
    return found


def _public_key(one: Mapping[str, Any]) -> PublicKey | None:
    if one.get("kty") not in _KINDS or one.get("use", "sig") != "sig" or "d" in one:
        return None
    try:
        key = PyJWK.from_dict(dict(one)).key
    except PyJWTError:
        # A curve or algorithm that PyJWT does not know.
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        return None
    return PublicKey(key, one.get("alg"))


def _said(error: Exception) -> str:
    """For logs: what kind of thing went wrong, without what was read."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


# Callers known by a JSON Web Token (RFC 7519) of an OpenID Connect issuer. Only public-key signatures are accepted.


WHY: Mapping[type[Exception], str] = {
    jwt.ExpiredSignatureError: "it has expired",
    jwt.ImmatureSignatureError: "it is not valid yet",
    jwt.InvalidIssuedAtError: "it was not issued yet",
    jwt.InvalidAudienceError: "it is for another audience",
    jwt.InvalidIssuerError: "it is from another issuer",
    jwt.MissingRequiredClaimError: "a claim is missing",
    jwt.InvalidSignatureError: "its signature is wrong",
}
"""Our own words: the library's quote the token."""
_MALFORMED = "it is not a token that can be read"


class Tokens:
    """Checks signature, issuer, audience and times, then reads name and roles from the claims."""

    wants = '"authorization: Bearer ..." with a token'

    def __init__(self, settings: JwtSettings, keys: Jwks, quota_of: Callable[[str], Quota]) -> None:
        self._settings, self._keys, self._quota_of = settings, keys, quota_of

    def recognises(self, presented: Presented) -> bool:
        """Whether there is a bearer token that is no API key."""
        return presented.bearer is not None and not presented.bearer.startswith(PREFIX)

    async def caller(self, presented: Presented) -> Caller:
        """Whom the token is for."""
        token = presented.bearer or ""
        header = _header(token)
        algorithm = header.get("alg")
        if algorithm not in self._settings.algorithms:
            raise _refused("it is not signed by an algorithm that is accepted here")
        found = await self._keys.find(header.get("kid"))
        if found is None or found.algorithm not in (None, algorithm):
            raise _refused("it is signed by a key that its issuer does not have")
        return self._named(self._claims(token, found.key, algorithm))

    def _claims(self, token: str, key: Any, algorithm: str) -> Mapping[str, Any]:
        try:
            # One algorithm, from our list, and a key of a kind: what the token says of itself chooses nothing.
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                issuer=self._settings.issuer,
                audience=self._settings.audience,
                leeway=self._settings.leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (jwt.PyJWTError, TypeError, ValueError) as err:
            # TypeError and ValueError: a key of another kind than the algorithm.
            raise _refused(next((text for kind, text in WHY.items() if isinstance(err, kind)), _MALFORMED)) from None
        return claims

    def _named(self, claims: Mapping[str, Any]) -> Caller:
        settings = self._settings
        name = _claim(claims, settings.name_claim)
        if not isinstance(name, str):
            raise _refused(f"its claim {settings.name_claim} is no name")
        known = {role.value: role for role in Role}
        given = _words(_claim(claims, settings.roles_claim))
        prefix = settings.roles_prefix
        roles = {one.removeprefix(prefix) for one in given if one.startswith(prefix)} & known.keys()
        tags = _words(_claim(claims, settings.tags_claim)) if settings.tags_claim is not None else ()
        name = f"{settings.name_prefix}{name}"
        try:
            return Caller(name, frozenset(known[one] for one in roles), frozenset(tags), self._quota_of(name))
        except ValueError:
            raise _refused(f"its claim {settings.name_claim} is no name") from None


def _header(token: str) -> Mapping[str, Any]:
    try:
        return jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise _refused(_MALFORMED) from None


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """The claim of that name, or at that place; None where there is none."""
    if path in claims:
        return claims[path]
    at: Any = claims
    for part in path.split("."):
        if not isinstance(at, Mapping) or part not in at:
            return None
        at = at[part]
    return at


def _words(claim: Any) -> tuple[str, ...]:
    """A list's strings, or a string's words; nothing else is any."""
    if isinstance(claim, str):
        return tuple(claim.split())
    return tuple(one for one in claim if isinstance(one, str)) if isinstance(claim, list) else ()


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated(f"the token is refused: {why}")
