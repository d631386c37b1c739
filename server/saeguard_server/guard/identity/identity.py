"""Who calls: certificate, then API key, then token; exactly one of them per call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from saeguard_server.caller import Caller
from saeguard_server.errors import Unauthenticated
from saeguard_server.guard.identity.api_keys import ApiKeys
from saeguard_server.guard.identity.certificates import Certificates
from saeguard_server.guard.identity.jwks import open_jwks
from saeguard_server.guard.identity.presented import Authenticator, Presented
from saeguard_server.guard.identity.tokens import Tokens
from saeguard_server.identity_settings import CertificateSettings, IdentitySettings

LOG = logging.getLogger("saeguard.identity")


class Identity:
    """Asks each authenticator. Without any, everybody is ``everybody``."""

    def __init__(self, authenticators: Sequence[Authenticator], everybody: Caller | None) -> None:
        assert (everybody is None) == bool(authenticators), "either callers are asked, or they are all one"
        self._authenticators = tuple(authenticators)
        self._everybody = everybody

    @classmethod
    def of(cls, settings: IdentitySettings) -> Identity:
        """As the settings say.

        Raises:
            BadSettings: a file of keys cannot be used.
        """
        found: list[Authenticator] = []
        if settings.certificates:
            found.append(Certificates({one.id: _certified(one, settings) for one in settings.certificates}))
        if settings.api_keys is not None:
            found.append(ApiKeys(Path(settings.api_keys), settings.quota_of))
        if settings.jwt is not None:
            found.append(Tokens(settings.jwt, open_jwks(settings.jwt), settings.quota_of))
        if not found:
            everybody = _everybody(settings)
            level = logging.WARNING if settings.allow_anonymous else logging.INFO
            fields = {"caller": everybody.name, "roles": sorted(everybody.roles)}
            LOG.log(level, "nobody is asked who calls", extra={"fields": fields})
            return cls(found, everybody)
        return cls(found, None)

    async def caller(self, presented: Presented) -> Caller:
        """Who this is.

        Raises:
            Unauthenticated: nothing was shown, more than one thing, or one that is not valid.
            Unavailable, Overloaded: that cannot be found out now.
        """
        if self._everybody is not None:
            return self._everybody
        found = [one for one in self._authenticators if one.recognises(presented)]
        has_certificate = any(isinstance(one, Certificates) for one in found)
        if has_certificate + len(presented.authorization) > 1:
            raise Unauthenticated("more than one credential was shown: send one certificate, key or token")
        if not found:
            wanted = ", or ".join(one.wants for one in self._authenticators)
            raise Unauthenticated(f"who calls? This server wants {wanted}")
        return await found[0].caller(presented)


def _certified(one: CertificateSettings, settings: IdentitySettings) -> Caller:
    return Caller(one.name, frozenset(one.roles), frozenset(one.tags), settings.quota_of(one.name))


def _everybody(settings: IdentitySettings) -> Caller:
    if settings.allow_anonymous:
        return Caller("anonymous", frozenset(settings.anonymous_roles), quota=settings.quota_of("anonymous"))
    return Caller.local(settings.quota_of("local"))
