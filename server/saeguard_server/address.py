"""Where a socket listens, as settings write it."""

from __future__ import annotations

from typing import NamedTuple


class Address(NamedTuple):
    """Where a socket listens. ``port`` 0 is any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """``host:port``; an IPv6 host stands in brackets.

        Raises:
            ValueError: anything else.
        """
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65_535
        if not (colon and bare and is_port) or (":" in bare and bare == host):
            raise ValueError(f"must be host:port, such as 127.0.0.1:50051 or [::1]:50051, got {text!r}")
        return cls(bare, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")
