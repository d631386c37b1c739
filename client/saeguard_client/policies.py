"""Policies as people read and write them: YAML documents, and the revisions they make."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class PolicySummary:
    """One policy at a glance; ``rules`` and ``triggers`` are names."""

    name: str
    mode: str
    owner: str
    share: float
    rules: tuple[str, ...]
    triggers: tuple[str, ...]
    expires: datetime | None


@dataclass(frozen=True, slots=True)
class Revision:
    """All policies as they were after one change; ``diff`` tells it from the one before."""

    number: int
    author: str
    time: datetime
    reason: str
    diff: str


@dataclass(frozen=True, slots=True)
class Activation:
    """An act that put a revision in force."""

    number: int
    revision: int
    actor: str
    time: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class PolicyFinding:
    """What is noticed about a policy that can be stored all the same; ``policy`` is "" for the whole set."""

    policy: str
    message: str


@dataclass(frozen=True, slots=True)
class PolicySet:
    """The policies of one revision.

    Attributes:
        yaml: all of them as documents in one text.
        etag: of the latest revision: what a change must name, so that no change of somebody else is lost.
        revision: None while there is none.
        active: what is in force; None before the first activation.
    """

    policies: tuple[PolicySummary, ...]
    yaml: str
    etag: str
    revision: Revision | None
    active: Activation | None


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """The revision that a change made, or would make; ``etag`` is what the next change must name.

    ``revision`` has an empty diff where nothing would change.
    """

    revision: Revision
    etag: str
    findings: tuple[PolicyFinding, ...]


@dataclass(frozen=True, slots=True)
class PolicyHistory:
    """Revisions and activations, the latest first."""

    revisions: tuple[Revision, ...]
    activations: tuple[Activation, ...]
