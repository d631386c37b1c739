"""The deployment's files, parsed."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from saeguard_server import cli
from saeguard_server.observe import Metrics
from saeguard_server.settings import Settings, load_settings

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
TARGET_LABELS = {"instance", "job"}
"""Labels that Prometheus itself adds."""

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def deploy() -> Path:
    """The folder under test."""
    return ROOT / "deploy"


@pytest.fixture(scope="session")
def instructions(deploy: Path) -> list[tuple[str, str]]:
    """The Dockerfile's instructions as name and body, without comments, continued lines joined."""
    lines = [line for line in (deploy / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    parts = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    assert len(parts) > 20
    return [(name, body.strip()) for name, _, body in parts]


@pytest.fixture(scope="session")
def image(instructions: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Bodies by name, of the stage that becomes the image."""
    names = [name for name, _ in instructions]
    start = len(names) - names[::-1].index("FROM")
    bodies: dict[str, list[str]] = {}
    for name, body in instructions[start:]:
        bodies.setdefault(name, []).append(body)
    return bodies


@pytest.fixture(scope="session")
def health_command(image: dict[str, list[str]]) -> list[str]:
    """The image's health check, which must be in exec form."""
    (body,) = image["HEALTHCHECK"]
    options, _, command = body.partition(" CMD ")
    assert "--timeout=" in options
    words: list[str] = json.loads(command)
    return words


@pytest.fixture(scope="session")
def settings_of() -> Callable[[list[str]], Settings]:
    """What ``saeguard serve ...`` would run with; an unknown flag fails."""

    def parse(command: list[str]) -> Settings:
        parser = argparse.ArgumentParser()
        cli.add_serve(parser.add_subparsers())
        arguments = parser.parse_args(command)
        return load_settings(arguments.config, cli.serve_overrides(arguments))

    return parse


@pytest.fixture(scope="session")
def compose(deploy: Path) -> dict[str, Any]:
    """compose.yaml."""
    parsed: dict[str, Any] = yaml.safe_load((deploy / "compose.yaml").read_text())
    return parsed


@pytest.fixture(scope="session")
def manifests(deploy: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What kustomize makes of a folder under deploy/kubernetes."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    made: dict[str, list[dict[str, Any]]] = {}

    def render(name: str) -> list[dict[str, Any]]:
        if name not in made:
            command = ["kubectl", "kustomize", str(deploy / "kubernetes" / name)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            made[name] = list(yaml.safe_load_all(done.stdout))
        return made[name]

    return render


@pytest.fixture(scope="session")
def rules(deploy: Path) -> list[dict[str, Any]]:
    """Every alert."""
    groups = yaml.safe_load((deploy / "prometheus" / "rules.yaml").read_text())["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) >= 5
    return found


@pytest.fixture(scope="session")
def declared() -> dict[str, set[str]]:
    """Labels of every series the server exposes."""
    metrics = Metrics(CollectorRegistry())
    every = [*vars(metrics).values(), *vars(metrics.policy_rules).values()]
    wrappers = [one for one in every if isinstance(one, MetricWrapperBase)]
    assert len(wrappers) > 10
    series = {"up": TARGET_LABELS}
    for one in wrappers:
        (family,) = one.describe()
        for suffix in SUFFIXES[family.type]:
            # There is no public way to ask a metric for its labels.
            series[family.name + suffix] = {*one._labelnames, *TARGET_LABELS, *(["le"] if suffix == "_bucket" else [])}
    return series
