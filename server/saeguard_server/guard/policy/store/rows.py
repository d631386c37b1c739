"""Between the rows of a database and the nouns of ``model``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Table

from saeguard_server.guard.policy import document
from saeguard_server.guard.policy.changes import PolicyChange
from saeguard_server.guard.policy.model import Activation, Policy, Revision
from saeguard_server.guard.policy.store import seals
from saeguard_server.guard.policy.store.protocol import Change, StoreCorrupted


def now() -> str:
    """The time of an act; people read it, nothing is ordered or timed by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def sealed(table: Table, previous: Mapping[str, Any] | None, **values: object) -> dict[str, Any]:
    """A new row after ``previous``."""
    row = values | {"previous": "" if previous is None else previous["seal"], "time": now()}
    return row | {"seal": seals.seal(table, row)}


def documents_of(policies: Iterable[Policy]) -> dict[str, str]:
    """Digest to body, in the order of the policies."""
    bodies = (document.to_canonical(policy) for policy in policies)
    return {seals.digest(body): body for body in bodies}


def members_text(policies: Sequence[Policy], documents: Iterable[str]) -> str:
    """Which policies a revision holds, as its row says it."""
    pairs = zip((policy.name for policy in policies), documents, strict=True)
    return json.dumps(list(pairs), ensure_ascii=False)


def members(text: str) -> dict[str, str]:
    """A revision's policies by name, each with its document's digest."""
    return dict(json.loads(text))


def revision(values: Mapping[str, Any], policies: Sequence[Policy]) -> Revision:
    """A revision with its policies."""
    return Revision(policies=tuple(policies), **_act(values, "number", "author", "reason"))


def change(values: Mapping[str, Any]) -> Change:
    """A revision as the history lists it."""
    policies = tuple(PolicyChange(*one) for one in json.loads(values["changes"]))
    return Change(policies=policies, **_act(values, "number", "author", "reason"))


def activation(values: Mapping[str, Any]) -> Activation:
    """An act."""
    return Activation(**_act(values, "number", "revision", "actor", "reason"))


def changes_text(changes: Sequence[PolicyChange]) -> str:
    """As a revision's row holds them."""
    return json.dumps([[one.name, one.kind, one.diff] for one in changes], ensure_ascii=False)


def policies(wanted: Mapping[str, str], bodies: Mapping[str, str], known: Mapping[str, Policy]) -> dict[str, Policy]:
    """Digest to policy for a revision's members; those in ``known`` are not parsed again.

    Raises:
        StoreCorrupted: a document is missing, altered, or not a policy that this server can read.
    """
    return {
        digest: known[digest] if digest in known else _parsed(name, digest, bodies) for name, digest in wanted.items()
    }


def _parsed(name: str, digest: str, bodies: Mapping[str, str]) -> Policy:
    if digest not in bodies or seals.digest(bodies[digest]) != digest:
        raise StoreCorrupted(f"the document of policy {name!r} is missing or not what was written")
    try:
        policy = document.from_canonical(bodies[digest])
    except ValueError as err:
        raise StoreCorrupted(f"the document of policy {name!r} cannot be read: {err}") from err
    if policy.name != name:
        raise StoreCorrupted(f"the document of policy {name!r} is one of {policy.name!r}")
    return policy


def _act(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names} | {"time": datetime.fromisoformat(values["time"])}
