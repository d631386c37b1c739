"""Callers known by a name in the client certificate that TLS has verified."""

from __future__ import annotations

from collections.abc import Mapping

from saeguard_server.caller import Caller
from saeguard_server.errors import Unauthenticated
from saeguard_server.guard.identity.presented import Presented

SPIFFE = "spiffe://"


class Certificates:
    """A table from names to callers.

    A certificate with none of the names is no credential: it opened the connection, and says nothing of who calls.
    """

    wants = "a client certificate with a known name"

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers = dict(callers)

    def recognises(self, presented: Presented) -> bool:
        """Whether the certificate has a name in the table."""
        return bool(self._named(presented))

    async def caller(self, presented: Presented) -> Caller:
        """The one caller that the certificate names."""
        found = self._named(presented)
        if len(found) != 1:
            raise Unauthenticated("the client certificate names more than one caller")
        return self._callers[found[0]]

    def _named(self, presented: Presented) -> list[str]:
        # A name only counts as what it is: a DNS name with a scheme is no URI, and a URI without one is no DNS name.
        shown = {one for one in presented.uris if ":" in one and not one.startswith(SPIFFE)}
        shown |= {one for one in presented.dns if ":" not in one}
        shown |= {presented.spiffe_id} if presented.spiffe_id is not None else set()
        return [name for name in self._callers if name in shown]
