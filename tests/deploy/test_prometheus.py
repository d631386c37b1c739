"""Alerts watch metrics, labels and values that the server really has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import saeguard_server
from saeguard_server.rpc.interceptor import CODE_NAMES


def series_in(expression: str) -> list[str]:
    return re.findall(r"\b(?:up|(?:saeguard|grpc)_\w+)\b(?=[\[{ )]|$)", expression)


def matchers_in(expression: str) -> list[tuple[str, str, str]]:
    """(series, label, value) of each matcher."""
    return [
        (series, label, value)
        for series, body in re.findall(r"(\w+)\{([^}]*)\}", expression)
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', body)
    ]


def test_every_series_is_declared(rules: list[dict[str, Any]], declared: dict[str, set[str]]) -> None:
    for rule in rules:
        used = series_in(rule["expr"])
        assert used, rule["alert"]
        assert set(used) <= declared.keys(), rule["alert"]


def test_every_label_belongs_to_its_series(rules: list[dict[str, Any]], declared: dict[str, set[str]]) -> None:
    matched = [(rule["alert"], *found) for rule in rules for found in matchers_in(rule["expr"])]
    assert len(matched) >= 4
    for alert, series, label, _ in matched:
        assert label in declared[series], alert
    for rule in rules:
        labels = set().union(*(declared[series] for series in series_in(rule["expr"])))
        for group in re.findall(r"by \(([^)]*)\)", rule["expr"]):
            assert {label.strip() for label in group.split(",")} <= labels, rule["alert"]


def test_every_matched_value_occurs(rules: list[dict[str, Any]]) -> None:
    server = Path(saeguard_server.__file__).parent
    sources = "".join(path.read_text() for path in server.rglob("*.py"))
    values = {(label, value) for rule in rules for _, label, value in matchers_in(rule["expr"])}
    codes = [code for label, value in values if label == "grpc_code" for code in value.split("|")]
    reasons = [value for label, value in values if label == "reason"]
    assert codes
    assert set(codes) <= set(CODE_NAMES.values())
    assert reasons
    assert all(f'"{reason}"' in sources for reason in reasons)


def test_alerts_have_names_of_their_own_and_say_what_to_do(rules: list[dict[str, Any]]) -> None:
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


def test_every_alert_is_tried(rules: list[dict[str, Any]]) -> None:
    tried = (Path(__file__).parent / "rules_test.yaml").read_text()
    assert [rule["alert"] for rule in rules if f'alertname="{rule["alert"]}"' not in tried] == []


def test_prometheus_scrapes_the_server_of_compose(deploy: Path, compose: dict[str, Any]) -> None:
    config = yaml.safe_load((deploy / "prometheus" / "prometheus.yml").read_text())
    assert config["rule_files"] == ["rules.yaml"]
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "saeguard"
    ((target,),) = [static["targets"] for static in job["static_configs"]]
    host, port = target.split(":")
    command = compose["services"][host]["command"]
    assert command[command.index("--metrics-listen") + 1].endswith(f":{port}")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_agrees() -> None:
    rules_test = Path(__file__).parent / "rules_test.yaml"
    done = subprocess.run(["promtool", "test", "rules", rules_test], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
