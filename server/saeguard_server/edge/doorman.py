"""Who is at the door, and may it come in: from gRPC's metadata and certificate to a caller that may call the method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from saeguard_server.caller import NOBODY, Caller
from saeguard_server.errors import PermissionDenied, Unauthenticated
from saeguard_server.guard.identity import access
from saeguard_server.guard.identity.identity import Identity
from saeguard_server.guard.identity.presented import Presented
from saeguard_server.observe.metrics import Metrics

if TYPE_CHECKING:
    from saeguard_server.edge.types import Context

AUTHORIZATION = "authorization"
COUNTED_AS = {Unauthenticated: "unauthenticated", PermissionDenied: "permission_denied"}


class Doorman:
    """Asks once for every RPC."""

    def __init__(self, identity: Identity, needs: access.Table, metrics: Metrics) -> None:
        self._identity, self._needs, self._refusals = identity, needs, metrics.refusals

    async def recognise(self, context: Context, method: str) -> Caller:
        """Who calls; nobody in particular where nobody is asked.

        Raises:
            Unauthenticated: it is not known who it is.
            Unavailable, Overloaded: that cannot be found out now.
        """
        with self._counted():
            if access.need(self._needs, method) is access.Anybody.AT_ALL:
                return NOBODY
            return await self._identity.caller(_presented(context))

    def check(self, caller: Caller, method: str) -> None:
        """Whether this caller may call the method.

        Raises:
            PermissionDenied: it has not the role.
        """
        with self._counted():
            access.check(caller, access.need(self._needs, method), method.rpartition("/")[2])

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except (Unauthenticated, PermissionDenied) as err:
            self._refusals.labels(COUNTED_AS[type(err)]).inc()
            raise


def _presented(context: Context) -> Presented:
    metadata = context.invocation_metadata() or ()
    # The core gives a certificate's names only once it has verified the certificate.
    shown: Mapping[str, Iterable[bytes]] = context.auth_context()
    spiffe_ids = _names(shown, "peer_spiffe_id")
    return Presented(
        authorization=tuple(value for key, value in metadata if key == AUTHORIZATION and isinstance(value, str)),
        spiffe_id=spiffe_ids[0] if spiffe_ids else None,
        uris=_names(shown, "peer_uri"),
        dns=_names(shown, "peer_dns"),
    )


def _names(shown: Mapping[str, Iterable[bytes]], key: str) -> tuple[str, ...]:
    return tuple(one.decode(errors="replace") for one in shown[key]) if key in shown else ()
