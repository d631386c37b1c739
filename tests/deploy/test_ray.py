"""The two roles of a server over several machines, in compose.ray.yaml and in Kubernetes, fit together."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeguard_server.settings import load_settings

Parse = Callable[[list[str]], Any]


@dataclass(frozen=True)
class Roles:
    """Scripts and environments of a deployment's head and worker."""

    head: str
    worker: str
    head_environment: dict[str, Any]
    worker_environment: dict[str, Any]


@pytest.fixture(scope="module")
def services(deploy: Path) -> dict[str, Any]:
    parsed = yaml.safe_load((deploy / "compose.ray.yaml").read_text())
    found: dict[str, Any] = parsed["services"]
    return found


@pytest.fixture(scope="module")
def group(manifests: Callable[[str], list[dict[str, Any]]]) -> dict[str, Any]:
    (found,) = [one for one in manifests("overlays/ray") if one["kind"] == "LeaderWorkerSet"]
    return found


@pytest.fixture(scope="module", params=["compose", "kubernetes"])
def roles(request: pytest.FixtureRequest) -> Roles:
    if request.param == "compose":
        services = request.getfixturevalue("services")
        return Roles(
            *(services[role]["command"][0].replace("$$", "$") for role in ("head", "worker")),
            *(services[role]["environment"] for role in ("head", "worker")),
        )
    template = request.getfixturevalue("group")["spec"]["leaderWorkerTemplate"]
    (head,), (worker,) = (template[role]["spec"]["containers"] for role in ("leaderTemplate", "workerTemplate"))
    environments = ({one["name"]: one for one in container["env"]} for container in (head, worker))
    return Roles(head["args"][0], worker["args"][0], *environments)


def commands(script: str) -> list[str]:
    return script.replace("\\\n", "").strip().splitlines()


def test_workers_join_the_head_at_its_port(roles: Roles) -> None:
    (port,) = re.findall(r"--port=(\d+)", roles.head)
    (address,) = re.findall(r'--address="([^"]+)"', roles.worker)
    if address == "$HEAD_ADDRESS":
        address = roles.worker_environment["HEAD_ADDRESS"]
    assert address.endswith(f":{port}")


def test_the_server_becomes_process_1_and_finds_the_cluster(roles: Roles) -> None:
    start, export, serve = commands(roles.head)
    assert start.startswith("ray start --head")
    assert start.endswith("|| exit 1")
    assert export.startswith("export RAY_ADDRESS=")
    assert serve.startswith("exec saeguard serve ")
    (only,) = commands(roles.worker)
    assert only.startswith("exec ray start ")
    assert only.endswith("--block")


def test_the_server_is_started_with_flags_that_it_has(roles: Roles, settings_of: Parse, deploy: Path) -> None:
    words = commands(roles.head)[-1].split()[2:]
    at = words.index("--config") + 1
    words[at] = str(deploy / "kubernetes" / "overlays" / "ray" / "saeguard.toml")
    assert settings_of(words).engine.vllm.executor == "ray"


def test_nobody_joins_without_the_token(roles: Roles) -> None:
    for environment in (roles.head_environment, roles.worker_environment):
        mode = environment["RAY_AUTH_MODE"]
        assert (mode["value"] if isinstance(mode, dict) else mode) == "token"
        token = environment["RAY_AUTH_TOKEN"]
        # Neither file holds it.
        assert (
            token.startswith("${RAY_AUTH_TOKEN:?") if isinstance(token, str) else "secretKeyRef" in token["valueFrom"]
        )


def test_each_says_its_own_address(roles: Roles) -> None:
    for script, environment in ((roles.head, roles.head_environment), (roles.worker, roles.worker_environment)):
        assert '--node-ip-address="$VLLM_HOST_IP"' in script
        assert "VLLM_HOST_IP" in environment


def test_ray_leaves_room_in_the_shared_memory(roles: Roles) -> None:
    sizes = re.findall(r"--object-store-memory=(\d+)", roles.head + roles.worker)
    assert len(sizes) == 2
    assert all(int(one) <= 2**30 for one in sizes)


def test_a_head_has_the_profile_of_its_machine(services: dict[str, Any], deploy: Path) -> None:
    settings = load_settings(deploy / "kubernetes" / "overlays" / "ray" / "saeguard.toml")
    assert {name: body["profiles"] for name, body in services.items()} == {"head": ["head"], "worker": ["worker"]}
    for body in services.values():
        (devices,) = body["deploy"]["resources"]["reservations"]["devices"]
        assert devices["count"] == settings.engine.vllm.tensor_parallel
    assert len(services) == settings.engine.vllm.pipeline_parallel


def test_keys_are_mounted_where_the_settings_look(services: dict[str, Any]) -> None:
    (mount,) = [one.rsplit(":", 2)[1:] for one in services["head"]["volumes"] if one.startswith("${KEYS:?")]
    assert mount == ["/etc/saeguard-keys", "ro"]


def test_both_services_are_confined(services: dict[str, Any], settings_of: Parse, deploy: Path) -> None:
    for body in services.values():
        assert body["read_only"] is True
        assert body["cap_drop"] == ["ALL"]
        assert body["security_opt"] == ["no-new-privileges:true"]
        assert body["mem_limit"]
    # They share the machine's network: listening elsewhere than on loopback would be open to everybody.
    words = commands(services["head"]["command"][0])[-1].split()
    addresses = [words[words.index(flag) + 1] for flag in ("--listen", "--metrics-listen")]
    assert all(address.startswith("127.0.0.1:") for address in addresses)


def test_a_drain_gets_its_time_on_both_machines(services: dict[str, Any], group: dict[str, Any], deploy: Path) -> None:
    server = load_settings(deploy / "kubernetes" / "overlays" / "ray" / "saeguard.toml").server
    drain_s = server.drain_s + server.drain_delay_s
    assert all(float(body["stop_grace_period"].removesuffix("s")) >= drain_s + 10 for body in services.values())
    worker = group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]
    sleep, seconds = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    assert drain_s + 5 <= int(seconds) < worker["terminationGracePeriodSeconds"]


def test_workers_find_a_leader_that_is_not_ready_yet(
    group: dict[str, Any], manifests: Callable[[str], list[dict[str, Any]]]
) -> None:
    # The controller leaves alone a Service that has the group's name, and ours names only pods that are ready.
    taken = {one["metadata"]["name"] for one in manifests("overlays/ray") if one["kind"] == "Service"}
    assert group["metadata"]["name"] not in taken
    assert group["spec"]["startupPolicy"] == "LeaderCreated"
    # A worker that gave up would restart, and with it the group.
    assert group["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    (wait,) = group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["initContainers"]
    assert wait["args"][0].startswith('until ray health-check --address "$LWS_LEADER_ADDRESS:6379"; do sleep ')
    assert {one["name"] for one in wait["env"]} >= {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def test_the_groups_pods_reach_each_other_and_nobody_else_does(
    manifests: Callable[[str], list[dict[str, Any]]],
) -> None:
    policies = [one["spec"] for one in manifests("overlays/ray") if one["kind"] == "NetworkPolicy"]
    ours = {"matchLabels": {"app.kubernetes.io/name": "saeguard"}}
    open_ports = [rule for policy in policies for rule in policy["ingress"] if "ports" not in rule]
    assert open_ports == [{"from": [{"podSelector": ours}]}]
