"""Diffs of policies: right where they are short, and bounded in work and length."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest

from saeguard.types import FeatureRef, Zero
from saeguard_server.errors import DeadlineExceeded
from saeguard_server.policy.changes import DIFF_BYTES, MAX_CHANGED_LINES, SET_BYTES, policy_changes
from saeguard_server.policy.document import policy_to_yaml
from saeguard_server.policy.model import Policy, PolicyLimits
from saeguard_server.threads import Cancellation
from support.policy_shapes import policy, rule


def denying(*features: int, name: str = "p") -> Policy:
    refs = tuple(FeatureRef("mid", feature) for feature in features)
    return policy(name, rule("r", Zero("mid", 2)), limits=PolicyLimits(denied_features=refs))


def only_diff(before: Policy, after: Policy) -> str:
    (change,) = policy_changes([before], [after])
    return change.diff


def test_one_line_of_many_is_shown_at_its_place() -> None:
    numbers = list(range(20_000))
    before, after = denying(*numbers), denying(*numbers[:9_000], 77_777, *numbers[9_001:])
    lines = policy_to_yaml(before).splitlines()
    changed = next(index for index, line in enumerate(lines, 1) if "feature: 9000}" in line)
    diff = only_diff(before, after).splitlines()
    assert diff[2] == f"@@ -{changed - 3},7 +{changed - 3},7 @@"
    assert [re.sub(r"\D", "", line) for line in diff[3:]] == [
        *("8997", "8998", "8999"), "9000", "77777", *("9001", "9002", "9003"),
    ]  # fmt: skip


def test_what_differs_all_over_is_not_compared_line_by_line() -> None:
    before, after = (denying(*(index * step % 512 + index // 512 for index in range(20_000))) for step in (7, 11))
    diff = only_diff(before, after)
    assert diff.endswith("too long to show line by line\n")
    assert len(diff) < 200
    assert re.search(r"^\d{5} lines were \d{5} lines", diff, re.MULTILINE)
    short = MAX_CHANGED_LINES // 4
    assert "too long" not in only_diff(denying(*range(short)), denying(*range(short, 2 * short)))


def test_long_diffs_are_cut_and_say_so() -> None:
    diff = only_diff(denying(1), replace(denying(1), owner="é" * 4_000_000))
    assert len(diff.encode()) < DIFF_BYTES + 100
    assert re.search(rf"^\(these are the first {DIFF_BYTES} of \d+ bytes\)$", diff, re.MULTILINE)


def test_all_diffs_together_are_bounded_and_every_policy_is_named() -> None:
    policies = [replace(denying(1, name=f"p{index}"), owner="x" * 60_000) for index in range(20)]
    changes = policy_changes([], policies)
    assert sum(len(change.diff) for change in changes) < SET_BYTES + 20 * 100
    assert changes[-1].diff == f"{changes[-1].name}: created; the changes together are too long to show\n"
    assert len(changes) == 20


def test_comparing_ends_with_whoever_asked() -> None:
    with pytest.raises(DeadlineExceeded):
        policy_changes([], [denying(1)], Cancellation(time.monotonic()))
