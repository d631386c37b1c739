"""compose.yaml agrees with the image, with the server's flags, and with itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from saeguard_server.settings import Settings

Parse = Callable[[list[str]], Settings]


def test_the_command_is_accepted_and_listens_beyond_the_container(compose: dict[str, Any], settings_of: Parse) -> None:
    server = settings_of(compose["services"]["server"]["command"]).server
    assert (server.listen, server.metrics_listen) == ("0.0.0.0:50051", "0.0.0.0:9464")


def test_nobody_is_asked_who_calls_only_where_nobody_else_can_call(compose: dict[str, Any], settings_of: Parse) -> None:
    body = compose["services"]["server"]
    assert settings_of(body["command"]).identity.allow_anonymous
    assert all(port.startswith("127.0.0.1:") for port in body["ports"])


def test_a_drain_gets_its_time(compose: dict[str, Any], settings_of: Parse) -> None:
    body = compose["services"]["server"]
    server = settings_of(body["command"]).server
    assert float(body["stop_grace_period"].removesuffix("s")) >= server.drain_s + server.drain_delay_s + 10


def test_it_probes_as_the_image_does(compose: dict[str, Any], health_command: list[str]) -> None:
    assert compose["services"]["server"]["healthcheck"]["test"] == ["CMD", *health_command]


@pytest.mark.parametrize("service", ["server", "prometheus"])
def test_both_services_are_confined(compose: dict[str, Any], service: str) -> None:
    body = compose["services"][service]
    assert body["read_only"] is True
    assert body["cap_drop"] == ["ALL"]
    assert body["security_opt"] == ["no-new-privileges:true"]
    assert body["mem_limit"]
    assert all(port.startswith("127.0.0.1:") for port in body["ports"])


def test_volumes_are_declared_and_where_the_image_expects_them(
    compose: dict[str, Any], image: dict[str, list[str]]
) -> None:
    mounts = [volume.split(":")[:2] for body in compose["services"].values() for volume in body["volumes"]]
    named = {source: target for source, target in mounts if not source.startswith(".")}
    assert named.keys() == compose["volumes"].keys()
    assert f"HF_HOME={named['models']}/" in image["ENV"][0]
