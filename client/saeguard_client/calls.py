"""One call as data: its method, its request's bytes, how its replies are read. The shells send it, nothing more."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

import grpc

from saeguard_client import _checks

# What a channel and a call are given: TLS, retries, deadlines, metadata. No I/O but reading certificates.


DEFAULT_DEADLINE_S: Final = 600.0
DEFAULT_RETRIES: Final = 3
MAX_RETRIES: Final = 4
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
REQUEST_ID: Final = "x-request-id"
AUTHORIZATION: Final = "authorization"

StrPath: TypeAlias = str | PathLike[str]
ChannelOptions: TypeAlias = Sequence[tuple[str, Any]]
Token: TypeAlias = str | Callable[[], str]
"""A JSON Web Token, or what gives the one to use for the next call."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files; with none of them the connection is plain text."""

    root_certificates: StrPath | None = None
    private_key: StrPath | None = None
    certificate_chain: StrPath | None = None

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for plain text.

        Raises:
            ValueError: a private key without its certificate chain, or the other way round.
            OSError: a file cannot be read.
        """
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("private_key: goes together with certificate_chain")
        files = (self.root_certificates, self.private_key, self.certificate_chain)
        if files == (None, None, None):
            return None
        return grpc.ssl_channel_credentials(*(None if file is None else Path(file).read_bytes() for file in files))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a channel goes, and how."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...]


def endpoint(target: str | None, tls: Tls, retries: int, options: ChannelOptions) -> Endpoint:
    """Where to open a channel.

    Raises:
        ValueError: no target, or ``retries`` is not 0 to 4.
        OSError: a certificate cannot be read.
    """
    if target is None:
        raise ValueError("target: give a target or a channel")
    return Endpoint(_checks.text("target", target), tls.credentials(), (*channel_options(retries), *options))


def check_ready(target: str | None, tls: Tls, options: ChannelOptions) -> None:
    """A channel that the caller opened has its own answer to all of these.

    Raises:
        ValueError: one of them is given too.
    """
    if target is not None or tls != Tls() or options:
        raise ValueError("channel: brings its own target, TLS and options")


def channel_options(retries: int) -> tuple[tuple[str, Any], ...]:
    """Options of every channel we open; the caller's come after and win.

    Raises:
        ValueError: ``retries`` is not 0 to 4, which is as far as gRPC goes.
    """
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if _checks.whole("retries", retries, most=MAX_RETRIES):
        config["methodConfig"] = [{"name": [{}], "retryPolicy": _retry_policy(retries)}]
    return (
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", 1 if retries else 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    )


def _retry_policy(retries: int) -> dict[str, Any]:
    """gRPC repeats a call only before its first message arrived, and waits as long as the server's pushback says."""
    return {
        "maxAttempts": retries + 1,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PerCall:
    """What one call may say about itself."""

    deadline_s: float | None = None
    request_id: str | None = None

    def __post_init__(self) -> None:
        if self.deadline_s is not None:
            _checks.seconds("deadline_s", self.deadline_s)
        if self.request_id is not None:
            _check_header("request_id", self.request_id)


@dataclass(frozen=True, slots=True)
class Bearer:
    """What shows the server who calls, beside a certificate: nothing, an API key, or a token."""

    api_key: str | None = field(default=None, repr=False)
    token: Token | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.api_key is not None and self.token is not None:
            raise ValueError("api_key: the server takes one credential, not token as well")
        if self.api_key is not None:
            _check_secret("api_key", self.api_key)
        if self.token is not None and not callable(self.token):
            _check_secret("token", self.token)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """For the next call.

        Raises:
            ValueError: the token that was given for it cannot be sent.
        """
        secret = self.token() if callable(self.token) else self.token or self.api_key
        if secret is None:
            return ()
        _check_secret("token", secret)
        return ((AUTHORIZATION, f"Bearer {secret}"),)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a client says for every call that does not."""

    deadline_s: float | None
    metadata: tuple[tuple[str, str], ...]
    bearer: Bearer = Bearer()

    @classmethod
    def of(cls, deadline_s: float | None, metadata: Mapping[str, str], bearer: Bearer) -> Defaults:
        """Checked.

        Raises:
            ValueError: a deadline that is not above 0, metadata that HTTP/2 cannot carry, or two credentials.
        """
        for key, value in metadata.items():
            _check_header(f"metadata[{key!r}]", value)
        deadline = None if deadline_s is None else _checks.seconds("deadline_s", deadline_s)
        pairs = tuple((key.lower(), value) for key, value in metadata.items())
        if bearer != Bearer() and AUTHORIZATION in dict(pairs):
            raise ValueError("metadata['authorization']: the server takes one credential, not api_key or token as well")
        return cls(deadline, pairs, bearer)

    def of_call(self, call: PerCall) -> tuple[float | None, tuple[tuple[str, str], ...]]:
        """``(timeout_s, metadata)``; None is no limit, and the call's request id replaces the client's."""
        timeout_s = self.deadline_s if call.deadline_s is None else call.deadline_s
        metadata = (*self.metadata, *self.bearer.metadata())
        if call.request_id is None:
            return timeout_s, metadata
        return timeout_s, (*_without(metadata, REQUEST_ID), (REQUEST_ID, call.request_id))


def _without(metadata: Iterable[tuple[str, str]], key: str) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in metadata if pair[0] != key)


def _check_secret(name: str, value: object) -> None:
    """Never quotes it."""
    if not isinstance(value, str) or not value or not (value.isascii() and value.isprintable()) or " " in value:
        raise ValueError(f"{name}: must be printable ASCII without blanks")


def _check_header(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or not (value.isascii() and value.isprintable()):
        raise ValueError(f"{name}: must be printable ASCII, got {value!r}")


T = TypeVar("T")
Whole = TypeVar("Whole")
Part = TypeVar("Part")
PartOut = TypeVar("PartOut", covariant=True)


@dataclass(frozen=True, slots=True)
class UnaryCall(Generic[T]):
    """One request, one reply."""

    method: str
    request: bytes
    read: Callable[[bytes], T]
    options: PerCall


class Reader(Protocol[PartOut]):
    """Reads one stream's messages in their order."""

    def read(self, message: bytes) -> PartOut:
        """Raises InternalError where the message breaks the contract."""

    def finish(self) -> None:
        """Raises InternalError where the stream ended too early."""


@dataclass(frozen=True, slots=True)
class StreamCall(Generic[Part]):
    """One request, many replies; every run of it needs a new reader."""

    method: str
    request: bytes
    reader: Callable[[], Reader[Part]]
    options: PerCall


@dataclass(frozen=True, slots=True)
class EitherCall(Generic[Whole, Part]):
    """The same question with one reply or with a stream."""

    whole: UnaryCall[Whole]
    parts: StreamCall[Part]


@dataclass(frozen=True, slots=True)
class GatheredCall(Generic[Whole, Part]):
    """A stream whose parts make one answer."""

    parts: StreamCall[Part]
    gather: Callable[[Iterable[Part]], Whole]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some items of a listing and the token of the next page, empty on the last."""

    items: tuple[T, ...]
    next_token: str


class PagedCall(Generic[T]):
    """A listing that comes in pages: what to ask next, what to hand on. Serves one walk."""

    def __init__(self, ask: Callable[[str, int | None], UnaryCall[Page[T]]], limit: int | None) -> None:
        self._ask = ask
        self._left = limit
        self._token: str | None = ""

    def next_call(self) -> UnaryCall[Page[T]] | None:
        """None when there is nothing more to ask."""
        if self._token is None or self._left == 0:
            return None
        return self._ask(self._token, self._left)

    def accept(self, page: Page[T]) -> tuple[T, ...]:
        """The page's items, as many as the caller still wants."""
        items = page.items[: self._left]
        if self._left is not None:
            self._left -= len(items)
        self._token = page.next_token or None
        return items
