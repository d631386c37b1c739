"""The credentials of one call, and who can tell from them who calls; client certificates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from saeguard_server.caller import Caller
from saeguard_server.errors import Unauthenticated

BEARER = "Bearer "
API_KEY_PREFIX = "sg_"
SPIFFE = "spiffe://"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What came with one RPC. Only the certificate's names are verified yet: by TLS."""

    authorization: tuple[str, ...] = field(default=(), repr=False)
    """Values of the ``authorization`` metadata."""
    spiffe_id: str | None = None
    """Of a certificate with this one URI, as SPIFFE wants it."""
    uris: tuple[str, ...] = ()
    """Of the certificate's subject alternative names."""
    dns: tuple[str, ...] = ()
    """Of the certificate's subject alternative names."""

    @property
    def bearer(self) -> str | None:
        """The token after "Bearer", where there is exactly one such value."""
        if len(self.authorization) != 1:
            return None
        scheme, value = self.authorization[0][: len(BEARER)], self.authorization[0][len(BEARER) :]
        return value if scheme.lower() == BEARER.lower() else None


class Authenticator(Protocol):
    """One way to know a caller."""

    expects: str
    """What to send, for whoever sent nothing."""

    def recognises(self, credentials: Credentials) -> bool:
        """Whether there is a credential of this kind, valid or not."""
        ...

    async def caller(self, credentials: Credentials) -> Caller:
        """Who sent it.

        Raises:
            Unauthenticated: it is not valid.
            Unavailable, Overloaded: that cannot be found out now.
        """
        ...


class CertificateAuthenticator:
    """Callers known by a name in the client certificate.

    A certificate with none of the names is no credential: it opened the connection, and says nothing of who calls.
    """

    expects = "a client certificate with a known name"

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers = dict(callers)

    def recognises(self, credentials: Credentials) -> bool:
        """Whether the certificate has a name in the table."""
        return bool(self._known_names(credentials))

    async def caller(self, credentials: Credentials) -> Caller:
        names = self._known_names(credentials)
        if len(names) != 1:
            raise Unauthenticated("the client certificate names more than one caller")
        return self._callers[names[0]]

    def _known_names(self, credentials: Credentials) -> list[str]:
        # A name only counts as what it is: a DNS name with a scheme is no URI, and a URI without one is no DNS name.
        names = {uri for uri in credentials.uris if ":" in uri and not uri.startswith(SPIFFE)}
        names |= {name for name in credentials.dns if ":" not in name}
        names |= {credentials.spiffe_id} if credentials.spiffe_id is not None else set()
        return [name for name in self._callers if name in names]
