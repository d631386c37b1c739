"""Callers known by a JSON Web Token (RFC 7519) of an OpenID Connect issuer. Only public-key signatures are accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jwt

from saeguard_server.caller import Caller, Quota, Role
from saeguard_server.errors import Unauthenticated
from saeguard_server.guard.identity.jwks import Jwks
from saeguard_server.guard.identity.key_file import PREFIX
from saeguard_server.guard.identity.presented import Presented
from saeguard_server.identity_settings import JwtSettings

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
