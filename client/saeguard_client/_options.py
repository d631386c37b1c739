"""What a channel and a call are given: TLS, retries, deadlines, metadata. No I/O but reading certificates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeAlias

import grpc

from saeguard_client import _checks

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
