"""Who calls: by which credentials, a name, what it may do, and how much of it at once; and one call of theirs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

MAX_NAME_CHARS = 256
BEARER = "Bearer "
API_KEY_PREFIX = "sg_"

_Limit: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Role(StrEnum):
    """What a caller may do; ``identity.auth`` says which RPC needs which."""

    GENERATE = "generate"
    OBSERVE = "observe"
    """Learn values of features: activations, what is watched, conditions, what receipts measured; and the catalogue."""
    STEER = "steer"
    """Send interventions of its own, on top of generate or observe; triggers with both."""
    SPECIAL_TOKENS = "special-tokens"
    """Write special tokens: as text that is parsed for them, or as token ids."""
    POLICY_READ = "policy-read"
    """Read policies, name any of them in a request, and what they withhold or do in shadow."""
    POLICY_WRITE = "policy-write"
    POLICY_APPROVE = "policy-approve"
    ADMIN = "admin"
    """All of the others."""


class Quota(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one caller may use; None is no limit but the server's own."""

    max_concurrent: _Limit | None = None
    """Requests that run or wait at the same time."""
    tokens_per_minute: _Limit | None = None
    """Prompt and generated tokens; as many may be used at once after a minute without any."""
    max_features: _Limit | None = None
    """Features that one request edits, watches or depends on."""


UNLIMITED = Quota()


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
        if len(self.authorization) != 1:
            return None
        scheme, value = self.authorization[0][: len(BEARER)], self.authorization[0][len(BEARER) :]
        return value if scheme.lower() == BEARER.lower() else None


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who was recognised, or the one that everybody is where nobody has to be."""

    name: str
    roles: frozenset[Role]
    tags: frozenset[str] = frozenset()
    """What policies can be aimed at beside the name."""
    quota: Quota = UNLIMITED
    conversation: str | None = None
    """The one that its token speaks of, "" for none; None leaves it to each request."""
    is_anybody: bool = False
    """Whether several people call by this name, who must not learn of each other."""

    def __post_init__(self) -> None:
        check_caller_name(self.name)

    @classmethod
    def local(cls, quota: Quota = UNLIMITED) -> Caller:
        """Everybody who can reach a server that only this machine can reach."""
        return cls("local", frozenset(Role), quota=quota)

    def may(self, role: Role) -> bool:
        return role in self.roles or Role.ADMIN in self.roles


def check_caller_name(name: str) -> None:
    """Names are logged and audited. Raises ValueError: empty, too long, or with characters that do not print."""
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable() or name != name.strip():
        raise ValueError(f"name: must be 1 to {MAX_NAME_CHARS} printable characters without blanks around them")


LOCAL = Caller.local()

NOBODY = Caller("nobody", frozenset())
"""Who calls an RPC that is open to all, and whoever is not recognised yet."""


ALMOST_OVER_S = 0.01
"""gRPC's core cancels at a deadline by a clock of its own, which differs from ours by less than this."""


@dataclass(frozen=True, slots=True)
class Call:
    """One RPC: its id, ``deadline`` on the ``time.monotonic`` clock in seconds, and who calls.

    ``request_id`` is the server's own, for logs, records and choices by chance. ``client_request_id`` is what the
    caller names the call, or empty: two callers may choose the same one, and nothing is decided by it. ``arrived`` is
    on the same clock: what waits before the engine is part of how long an answer took.
    """

    request_id: str
    deadline: float
    caller: Caller = LOCAL
    arrived: float = field(default_factory=time.monotonic, compare=False)
    client_request_id: str = ""
