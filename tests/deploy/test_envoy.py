"""What stands in front of the servers fits them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeguard.wire import RPCS
from saeguard_server.settings import LimitSettings, ServerSettings


@pytest.fixture(scope="module")
def envoy(deploy: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((deploy / "envoy.yaml").read_text())
    return parsed["static_resources"]  # type: ignore[no-any-return]


def manager(envoy: dict[str, Any]) -> dict[str, Any]:
    (chain,) = envoy["listeners"][0]["filter_chains"]
    config: dict[str, Any] = chain["filters"][0]["typed_config"]
    return config


def test_every_rpc_and_health_checks_are_routed_and_nothing_else(envoy: dict[str, Any]) -> None:
    (host,) = manager(envoy)["route_config"]["virtual_hosts"]
    prefixes = [route["match"]["prefix"] for route in host["routes"]]
    assert all(any(rpc.path.startswith(prefix) for prefix in prefixes) for rpc in RPCS.values())
    assert prefixes == ["/saeguard.v1.", "/grpc.health.v1.Health/Check"]


def test_it_goes_to_the_port_that_is_served_and_lets_requests_last_as_long(envoy: dict[str, Any]) -> None:
    (cluster,) = envoy["clusters"]
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert ServerSettings().listen.endswith(f":{endpoint['port_value']}")
    (host,) = manager(envoy)["route_config"]["virtual_hosts"]
    longest = {route["route"]["max_stream_duration"]["grpc_timeout_header_max"] for route in host["routes"]}
    assert longest == {f"{LimitSettings().max_deadline_s:.0f}s"}


def test_envoy_takes_it(deploy: Path, tmp_path: Path) -> None:
    if (program := shutil.which("envoy")) is None:
        pytest.skip("envoy is not installed")
    text = (deploy / "envoy.yaml").read_text()
    key, certificate = tmp_path / "tls.key", tmp_path / "tls.crt"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    (tmp_path / "envoy.yaml").write_text(text.replace("/etc/envoy", str(tmp_path)))
    done = subprocess.run(
        [program, "--mode", "validate", "-c", tmp_path / "envoy.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
