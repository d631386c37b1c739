"""What one RPC leaves behind: counters under the names gRPC dashboards expect, and one log line."""

from __future__ import annotations

import logging
import time

import grpc

from saeguard_server.errors import InvalidRequest, PolicyRefusal, SaeguardError, UnknownName
from saeguard_server.observe.metrics import Metrics

LOG = logging.getLogger("saeguard.rpc")

CODE_NAMES = {code: "".join(word.title() for word in code.name.split("_")) for code in grpc.StatusCode} | {
    # As grpc-go spells them, where these metrics come from.
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}


class Record:
    """Follows one RPC from its start to ``close``."""

    def __init__(self, metrics: Metrics, method: str, kind: str, peer: str) -> None:
        _, service, name = method.split("/")
        self._labels = (kind, service, name)
        self._metrics = metrics
        self._method = method
        self.caller: str | None = None
        """Who calls, once that is known."""
        # Now: it is empty after a deadline.
        self._peer = peer
        self._began = time.perf_counter()
        self._sent = metrics.messages_sent.labels(*self._labels)
        self._messages = 0
        metrics.rpcs_started.labels(*self._labels).inc()

    def received(self) -> None:
        """A message came in."""
        self._metrics.messages_received.labels(*self._labels).inc()

    def sent(self) -> None:
        """A message went out."""
        self._messages += 1
        self._sent.inc()

    def close(self, code: grpc.StatusCode, error: SaeguardError | None, level: int) -> None:
        """The RPC has ended."""
        seconds = time.perf_counter() - self._began
        self._metrics.rpcs_handled.labels(*self._labels, CODE_NAMES[code]).inc()
        self._metrics.handling_seconds.labels(*self._labels).observe(seconds)
        fields: dict[str, object] = {
            "method": self._method,
            "code": code.name,
            "seconds": round(seconds, 6),
            "messages": self._messages,
            "peer": self._peer,
        }
        if self.caller is not None:
            fields["caller"] = self.caller
        if error is not None:
            # Reason and field, never the message: that quotes the caller.
            fields["reason"] = error.reason
        if isinstance(error, InvalidRequest | PolicyRefusal | UnknownName):
            fields["field"] = error.field
        LOG.log(level, "rpc", extra={"fields": fields})
