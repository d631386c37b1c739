"""compose.gpu.yaml and compose.vllm.yaml change of compose.yaml what a GPU needs, and nothing of how it is confined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from saeguard_server.settings import Settings, load_settings

SETTINGS = "/etc/saeguard.toml"
CHANGED = {"image", "build", "command", "volumes", "mem_limit", "pids_limit", "shm_size", "deploy", "healthcheck"}


@pytest.fixture(scope="module", params=["gpu", "vllm"])
def overlay(request: pytest.FixtureRequest, deploy: Path) -> dict[str, Any]:
    parsed = yaml.safe_load((deploy / f"compose.{request.param}.yaml").read_text())
    assert parsed.keys() == {"services"}
    (body,) = parsed["services"].values()
    assert body["image"].endswith(f":-{'cuda' if request.param == 'gpu' else 'vllm'}}}")
    server: dict[str, Any] = body
    return server


@pytest.fixture
def settings(overlay: dict[str, Any], deploy: Path) -> Settings:
    """What it mounts where its command reads it."""
    assert overlay["command"] == ["serve", "--config", SETTINGS]
    (source,) = [one.split(":")[0] for one in overlay["volumes"] if one.endswith(f":{SETTINGS}:ro")]
    return load_settings(deploy / source)


def test_it_changes_the_server_and_leaves_it_confined(overlay: dict[str, Any], compose: dict[str, Any]) -> None:
    assert "server" in compose["services"]
    assert overlay.keys() <= CHANGED


def test_ports_and_drain_are_those_that_compose_publishes_and_waits_for(
    settings: Settings, compose: dict[str, Any]
) -> None:
    below = compose["services"]["server"]
    assert settings.server.listen == "0.0.0.0:50051"
    assert [one.rpartition(":")[2] for one in below["ports"]] == ["50051"]
    drain_s = settings.server.drain_s + settings.server.drain_delay_s
    assert float(below["stop_grace_period"].removesuffix("s")) >= drain_s + 10


def test_as_many_devices_as_the_settings_use(overlay: dict[str, Any], settings: Settings) -> None:
    (devices,) = overlay["deploy"]["resources"]["reservations"]["devices"]
    assert devices["driver"] == "nvidia"
    assert devices["capabilities"] == ["gpu"]
    spread = settings.engine.vllm
    assert devices["count"] == spread.tensor_parallel * spread.pipeline_parallel
    assert settings.model.device.startswith("cuda")


def test_vllm_has_its_image_and_its_shared_memory(overlay: dict[str, Any], settings: Settings) -> None:
    is_vllm = settings.engine.kind == "vllm"
    assert ("ENGINE=vllm" in overlay["build"]["args"]) == is_vllm
    assert ("shm_size" in overlay) == is_vllm


def test_models_are_mounted_where_the_settings_look(overlay: dict[str, Any], settings: Settings) -> None:
    (mount,) = [one.rsplit(":", 2)[1:] for one in overlay["volumes"] if one.startswith("${MODELS:?")]
    assert mount == ["/models", "ro"]
    assert all(path.startswith("/models/") for path in (settings.model.path, *(sae.path for sae in settings.saes)))


def test_keys_are_mounted_where_the_settings_look(overlay: dict[str, Any], settings: Settings) -> None:
    (mount,) = [one.rsplit(":", 2)[1:] for one in overlay["volumes"] if one.startswith("${KEYS:?")]
    assert mount == ["/etc/saeguard-keys", "ro"]
    assert settings.identity.api_keys == "/etc/saeguard-keys/keys.json"


def test_its_health_waits_as_long_as_a_start_may_take(overlay: dict[str, Any], compose: dict[str, Any]) -> None:
    here, below = (float(one["healthcheck"]["start_period"].removesuffix("s"))
                   for one in (overlay, compose["services"]["server"]))  # fmt: skip
    assert here > below


def test_what_is_compiled_does_not_lie_in_a_tmpfs(compose: dict[str, Any]) -> None:
    # Docker mounts a tmpfs noexec, and compiled code could not be loaded from there.
    server = compose["services"]["server"]
    folder = server["environment"]["TORCHINDUCTOR_CACHE_DIR"]
    assert any(folder.startswith(one.split(":")[1] + "/") for one in server["volumes"])
    assert not any(folder.startswith(one.split(":")[0]) for one in server["tmpfs"])
