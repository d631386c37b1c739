"""HTTP/2 by hand: frames that no client library would send, on a connection of one's own."""

from __future__ import annotations

import asyncio
import re
import ssl
import struct
from dataclasses import dataclass, field
from types import TracebackType

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW, MAX_HEADER_LIST = 3, 4, 6


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def string(text: bytes) -> bytes:
    """In HPACK, without Huffman's code."""
    size, prefix = len(text), b""
    if size < 127:
        return bytes([size]) + text
    size -= 127
    while size >= 128:
        prefix += bytes([size % 128 + 128])
        size //= 128
    return b"\x7f" + prefix + bytes([size]) + text


def header_block(path: bytes, more: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A call's headers in HPACK, each written out and none remembered."""
    fields = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"),
              (b"te", b"trailers"), (b"content-type", b"application/grpc"), *more)  # fmt: skip
    return b"".join(b"\x00" + string(name) + string(value) for name, value in fields)


def grpc_message(body: bytes, *, compressed: bool = False) -> bytes:
    return struct.pack(">BI", compressed, len(body)) + body


@dataclass
class Http2:
    """A connection that writes what a test says and reads until the server ends it; a context manager."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    settings: bytes = b""
    frames: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    """Kind, flags, stream and payload of all that came, payloads cut to 4 KiB."""
    acknowledges: bool = True
    """Whether it says that it has read the server's settings: until then they bind nobody."""

    async def __aenter__(self) -> Http2:
        self._reader, self._writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls)
        self.closed = asyncio.Event()
        self._writer.write(PREFACE + frame(SETTINGS, 0, 0, self.settings))
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        self._writer.close()

    async def send(self, data: bytes) -> None:
        """Raises ConnectionError: the server has ended it."""
        self._writer.write(data)
        await self._writer.drain()

    async def open(self, stream: int, path: bytes, *body: bytes, more: tuple[tuple[bytes, bytes], ...] = (),
                   ends: bool = False) -> None:  # fmt: skip
        """HEADERS, then each body as DATA frames of at most 16 KiB; END_STREAM with the last only where it ``ends``."""
        parts = [part[at : at + 16_384] for part in body for at in range(0, len(part), 16_384)]
        written = frame(
            HEADERS, END_HEADERS | (END_STREAM if ends and not parts else 0), stream, header_block(path, more)
        )
        for index, part in enumerate(parts):
            written += frame(DATA, END_STREAM if ends and index == len(parts) - 1 else 0, stream, part)
        await self.send(written)

    def of_kind(self, *kinds: int) -> list[tuple[int, int, int, bytes]]:
        return [entry for entry in self.frames if entry[0] in kinds]

    async def until(self, kind: int, count: int = 1, within_s: float = 10.0) -> None:
        """Waits for so many frames of a kind, or the end of the connection. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while len(self.of_kind(kind)) < count and not self.closed.is_set():
                await asyncio.sleep(0.01)

    async def status(self, within_s: float = 10.0) -> str:
        """Of the first call that ended on this connection: gRPC's number, or "reset". Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while not self.closed.is_set():
                for kind, _, _, payload in self.frames:
                    if kind == RST_STREAM and payload != b"\0\0\0\0":
                        return "reset"
                    # Written out, as it is the connection's first.
                    if kind == HEADERS and (match := re.search(rb"grpc-status([\x01\x02])(\d+)", payload)):
                        return match[2][: match[1][0]].decode()
                await asyncio.sleep(0.01)
        return "closed"

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                self.frames.append((kind, flags, stream, payload[:4096]))
                if kind == SETTINGS and not flags & ACK and self.acknowledges:
                    self._writer.write(frame(SETTINGS, ACK, 0))
                elif kind == PING and not flags & ACK:
                    self._writer.write(frame(PING, ACK, 0, payload))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.closed.set()
