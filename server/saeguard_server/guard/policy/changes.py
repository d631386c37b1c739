"""What differs between two sets of policies, for people: which policies, and their lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import unified_diff
from typing import Literal, TypeAlias

from saeguard_server.guard.policy import document
from saeguard_server.guard.policy.model import Policy

ChangeKind: TypeAlias = Literal["created", "changed", "deleted"]


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """One policy that was made, changed or deleted."""

    name: str
    kind: ChangeKind
    diff: str
    """Unified, of the policy's YAML."""


def between(before: Sequence[Policy], after: Sequence[Policy]) -> tuple[PolicyChange, ...]:
    """The policies that differ, in the order of their names."""
    old, new = ({policy.name: policy for policy in side} for side in (before, after))
    pairs = ((name, old.get(name), new.get(name)) for name in sorted(old | new))
    return tuple(_change(name, one, other) for name, one, other in pairs if _differ(one, other))


def _differ(old: Policy | None, new: Policy | None) -> bool:
    if old is None or new is None:
        return True
    # What is not written down, such as the size of a window that has none, is no difference.
    return old != new and document.to_canonical(old) != document.to_canonical(new)


def _change(name: str, old: Policy | None, new: Policy | None) -> PolicyChange:
    kind: ChangeKind = "created" if old is None else "deleted" if new is None else "changed"
    lines = unified_diff(_lines(old), _lines(new), f"{name} before", f"{name} after")
    return PolicyChange(name, kind, "".join(lines))


def _lines(policy: Policy | None) -> list[str]:
    return [] if policy is None else document.to_yaml(policy).splitlines(keepends=True)
