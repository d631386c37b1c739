"""Serves /metrics over HTTP on its own port, so that it can be kept from callers."""

from __future__ import annotations

from types import TracebackType

from prometheus_client import CollectorRegistry, start_http_server

from saeguard_server.address import Address
from saeguard_server.settings import BadSettings


class Exporter:
    """A running /metrics endpoint; a context manager that stops it."""

    def __init__(self, registry: CollectorRegistry, address: Address) -> None:
        """Listens at once.

        Raises:
            BadSettings: the address cannot be used.
        """
        try:
            self._server, self._thread = start_http_server(address.port, address.host, registry)
        except OSError as err:
            raise BadSettings(f"server.metrics_listen: {address}: {err.strerror}") from err

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.server_port

    def __enter__(self) -> Exporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
