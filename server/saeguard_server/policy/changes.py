"""What differs between two sets of policies, for people: bounded, however much that is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from itertools import takewhile
from typing import Literal, TypeAlias

from saeguard_server.policy.document import canonical_json, policy_to_yaml
from saeguard_server.policy.model import Policy
from saeguard_server.threads import NEVER, Cancellation

MAX_CHANGED_LINES = 4_000
"""Of one policy, before and after together, from the first that differs to the last: more are not compared."""
CONTEXT = 3
DIFF_BYTES = 64 * 1024
"""Of one policy's diff."""
SET_BYTES = 256 * 1024
"""Of all of them together; what comes after is only named."""
_HUNK = re.compile(r"@@ -(\d+)(,\d+)? \+(\d+)(,\d+)? @@")

ChangeKind: TypeAlias = Literal["created", "changed", "deleted"]


@dataclass(frozen=True, slots=True)
class PolicyDiff:
    name: str
    kind: ChangeKind
    diff: str
    """Unified, of the policy's YAML; it says so where it is not whole."""


def policy_changes(
    before: Sequence[Policy], after: Sequence[Policy], cancellation: Cancellation = NEVER
) -> tuple[PolicyDiff, ...]:
    old, new = ({policy.name: policy for policy in side} for side in (before, after))
    changes, rest = [], SET_BYTES
    for name in sorted(old | new):
        cancellation.check()
        if _differ(old.get(name), new.get(name)):
            change = _change(name, old.get(name), new.get(name), rest)
            changes.append(change)
            rest -= len(change.diff.encode())
    return tuple(changes)


def cut_diff(diff: str, most: int) -> str:
    """Its first ``most`` bytes, and a line that says so where there are more."""
    raw = diff.encode()
    if len(raw) <= most:
        return diff
    return f"{raw[:most].decode(errors='ignore')}\n(these are the first {most} of {len(raw)} bytes)\n"


def _differ(old: Policy | None, new: Policy | None) -> bool:
    if old is None or new is None:
        return True
    # What is not written down, such as the size of a window that has none, is no difference.
    return old != new and canonical_json(old) != canonical_json(new)


def _change(name: str, old: Policy | None, new: Policy | None, rest: int) -> PolicyDiff:
    kind: ChangeKind = "created" if old is None else "deleted" if new is None else "changed"
    if rest <= 0:
        return PolicyDiff(name, kind, f"{name}: {kind}; the changes together are too long to show\n")
    before, after = ([] if side is None else policy_to_yaml(side).splitlines(keepends=True) for side in (old, new))
    lines = _diff(before, after, f"{name} before", f"{name} after")
    return PolicyDiff(name, kind, cut_diff("".join(lines), min(DIFF_BYTES, rest)))


def _diff(before: list[str], after: list[str], old: str, new: str) -> Iterator[str]:
    """Of what lies between the lines that both begin and end with: comparing all takes too long."""
    start = _common(before, after)
    end = _common(before[start:][::-1], after[start:][::-1])
    sizes = [len(side) - start - end for side in (before, after)]
    if min(sizes) > 0 and sum(sizes) > MAX_CHANGED_LINES:
        yield from (f"--- {old}\n", f"+++ {new}\n")
        yield f"{sizes[1]} lines were {sizes[0]} lines: too long to show line by line\n"
        return
    skipped = max(0, start - CONTEXT)
    left, right = (side[skipped : len(side) - max(0, end - CONTEXT)] for side in (before, after))
    for line in unified_diff(left, right, old, new, n=CONTEXT):
        yield _HUNK.sub(lambda hunk: _moved(hunk, skipped), line) if line.startswith("@@ ") else line


def _common(before: Sequence[str], after: Sequence[str]) -> int:
    pairs = zip(before, after, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _moved(hunk: re.Match[str], lines: int) -> str:
    first, size, second, other_size = hunk.groups(default="")
    return f"@@ -{int(first) + lines}{size} +{int(second) + lines}{other_size} @@"
