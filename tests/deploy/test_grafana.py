"""The dashboard shows series and labels that the server really has, and its panels do not overlap."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def dashboard(deploy: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((deploy / "grafana" / "policies.json").read_text())
    return found


def queries(dashboard: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    asked += [one["expr"] for one in dashboard["annotations"]["list"]]
    return asked + [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]


def test_every_series_and_label_is_declared(dashboard: dict[str, Any], declared: dict[str, set[str]]) -> None:
    asked = queries(dashboard)
    assert len(asked) > 12
    for query in asked:
        used = set(re.findall(r"\bsaeguard_\w+", query))
        assert used, query
        assert used <= declared.keys(), query
        labels = set().union(*(declared[one] for one in used))
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert {label.strip() for label in group.split(",")} <= labels, query
        for body in re.findall(r"\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)=~?", body)) <= labels, query


def test_every_series_of_policies_and_audit_is_shown(dashboard: dict[str, Any], declared: dict[str, set[str]]) -> None:
    shown = " ".join(queries(dashboard))
    ours = {one for one in declared if one.startswith(("saeguard_policy_rule_", "saeguard_audit_"))}
    ours = {one for one in ours if not one.endswith(("_sum", "_count"))}
    assert {one for one in ours if one not in shown} == set()


def test_panels_lie_side_by_side(dashboard: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
