"""What every store of policies does, and every way in which one cannot be followed.

StoreError
├── StoreUnreachable   no answer now, or no room left; it may come back
├── StoreCorrupted     what it holds is not what was written
├── SchemaMismatch     its tables are newer than this server, or missing
├── ContentRefused     files that are not a whole, valid set of policies
├── NotApplicable      a revision is in force that this server cannot enforce
├── WentBack           an older state than was seen: a restored backup or a lost failover
└── NothingActive      no revision is in force yet
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from saeguard.catalog import Activation, Revision
from saeguard_server.policy.changes import PolicyDiff
from saeguard_server.policy.model import Policy, PolicyRevision

NO_REVISION = "0"
"""Etag of a store that holds no revision yet."""
MAX_POLICIES = 1024
"""Policies of one revision."""
MAX_REASON_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Active:
    """What is in force. Equal exactly when act and content are the same."""

    activation: Activation
    revision: PolicyRevision
    digest: str
    """SHA-256, hex, over the act, the content and, in a database, all acts before it."""


class StoreError(Exception):
    """Base of them; ``reason`` is stable, for logs and metrics. Messages never hold a password."""

    reason: ClassVar[str]


class StoreUnreachable(StoreError):
    reason: ClassVar[str] = "unreachable"


class StoreCorrupted(StoreError):
    reason: ClassVar[str] = "corrupted"


class SchemaMismatch(StoreError):
    reason: ClassVar[str] = "schema"


class ContentRefused(StoreError):
    """The directory's files. ``in_force`` is the set that was read before them, and stays so."""

    reason: ClassVar[str] = "content"

    def __init__(self, message: str, in_force: Active | None = None) -> None:
        super().__init__(message)
        self.in_force = in_force


class NotApplicable(StoreError):
    reason: ClassVar[str] = "not_applicable"


class WentBack(StoreError):
    reason: ClassVar[str] = "went_back"


class NothingActive(StoreError):
    """Nobody has activated a revision: an empty or a wrong database must not mean "no policies"."""

    reason: ClassVar[str] = "nothing_active"


class PolicyStore(Protocol):
    """Revisions of the whole set of policies, and the acts that put one in force; both only ever grow.

    Every method that reads or writes raises a StoreError where the store cannot be used.
    """

    async def latest(self) -> PolicyRevision | None: ...

    async def revision(self, number: int) -> PolicyRevision:
        """One revision. Raises UnknownName: there is none of that number."""
        ...

    async def changes(self, *, limit: int, before: int | None = None) -> tuple[Revision, ...]:
        """Revisions, newest first: at most ``limit``, fewer where diffs are long, with numbers below ``before``."""
        ...

    async def activations(self, *, limit: int, before: int | None = None) -> tuple[Activation, ...]:
        """Acts, newest first: at most ``limit``, with numbers below ``before``."""
        ...

    async def authors_to_approve(self, number: int) -> frozenset[str]:
        """Who wrote what an activation of this revision would put in force for the first time, and its own author."""
        ...

    async def active(self) -> Active | None:
        """What is in force; None before the first activation."""
        ...

    async def write(
        self,
        policies: Sequence[Policy],
        *,
        etag: str,
        author: str,
        reason: str,
        changes: Sequence[PolicyDiff] | None = None,
    ) -> PolicyRevision:
        """Appends a revision that holds exactly these policies, and answers once it is durable.

        ``changes`` are those since the newest revision, where the caller has them.

        Raises:
            Conflict: ``etag`` is not the newest revision's number.
            ReadOnlyStore: the store takes no writes.
        """
        ...

    async def activate(
        self, revision: int, *, actor: str, reason: str, expected_activation: int | None = None
    ) -> Activation:
        """Puts a revision in force, and answers once that is durable.

        Raises:
            UnknownName: there is none of that number.
            Conflict: the newest activation is not ``expected_activation``.
            ReadOnlyStore: the store takes no writes.
        """
        ...

    async def wait(self, timeout_s: float) -> None:
        """Returns when something may have changed since it last returned, at the latest after ``timeout_s``."""
        ...

    async def close(self) -> None: ...
