"""What a caller shows of itself, and the protocol of those who can tell from it who that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from saeguard_server.caller import Caller

BEARER = "Bearer "


@dataclass(frozen=True, slots=True)
class Presented:
    """The credentials of one RPC. Only the certificate's names are verified yet: by TLS."""

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

    wants: str
    """What to show, for whoever showed nothing."""

    def recognises(self, presented: Presented) -> bool:
        """Whether there is a credential of this kind, valid or not."""
        ...

    async def caller(self, presented: Presented) -> Caller:
        """Who showed it.

        Raises:
            Unauthenticated: it is not valid.
            Unavailable, Overloaded: that cannot be found out now.
        """
        ...
