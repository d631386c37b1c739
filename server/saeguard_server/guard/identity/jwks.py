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

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK, PyJWKClient
from jwt.exceptions import PyJWTError

from saeguard_server.errors import Unavailable
from saeguard_server.identity_settings import JwtSettings
from saeguard_server.settings import BadSettings
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
