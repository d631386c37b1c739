"""The Kubernetes manifests as kustomize makes them: known to Kubernetes, of one mind with image and settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from saeguard_server.rpc.server import LIVENESS, OVERALL
from saeguard_server.settings import Address, Settings, load_settings

NAMES = ("base", "overlays/gpu", "overlays/vllm", "overlays/ray")
KUBERNETES = "1.32"
GPU = "nvidia.com/gpu"
STARTS_WITHIN_S = {"base": 120, "overlays/gpu": 900, "overlays/vllm": 1800, "overlays/ray": 1800}

Object = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """One folder's objects, with the settings that its server reads."""

    name: str
    objects: list[Object]
    settings: Settings

    def of(self, kind: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] == kind]

    @property
    def templates(self) -> list[Object]:
        """Of pods, the server's first."""
        groups = [one["spec"]["leaderWorkerTemplate"] for one in self.of("LeaderWorkerSet")]
        return [
            *(one["spec"]["template"] for one in self.of("Deployment")),
            *(one[role] for one in groups for role in ("leaderTemplate", "workerTemplate")),
        ]

    @property
    def server(self) -> Object:
        """The container that runs the server."""
        (found,) = self.templates[0]["spec"]["containers"]
        assert found["name"] == "server"
        container: Object = found
        return container


@pytest.fixture(scope="module", params=NAMES)
def made(
    request: pytest.FixtureRequest,
    manifests: Callable[[str], list[Object]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    objects = manifests(request.param)
    (config,) = [one for one in objects if one["kind"] == "ConfigMap"]
    file = tmp_path_factory.mktemp("settings") / "saeguard.toml"
    file.write_text(config["data"]["saeguard.toml"])
    return Made(request.param, objects, load_settings(file))


def containers(template: Object) -> Iterator[Object]:
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]


def matches(selector: Mapping[str, str], template: Object) -> bool:
    return selector.items() <= template["metadata"]["labels"].items()


def ports(container: Object) -> dict[str, int]:
    return {one["name"]: one["containerPort"] for one in container["ports"]}


def test_kubernetes_knows_every_object_and_field(made: Made) -> None:
    built_in = [one for one in made.objects if one["kind"] != "LeaderWorkerSet"]
    pods = [{"apiVersion": "v1", "kind": "Pod", **one} for one in made.templates]
    assert len(built_in) >= 4
    for one in [*built_in, *pods]:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_the_server_reads_the_settings_that_are_mounted(made: Made) -> None:
    (config,) = made.of("ConfigMap")
    (volume,) = [one for one in made.templates[0]["spec"]["volumes"] if "configMap" in one]
    # The hash in its name makes an edit roll out.
    assert volume["configMap"]["name"] == config["metadata"]["name"] != "saeguard"
    (mount,) = [one for one in made.server["volumeMounts"] if one["name"] == volume["name"]]
    assert f"{mount['mountPath']}/saeguard.toml" in " ".join(made.server["args"]).split()


def test_callers_are_known_by_keys_that_only_the_server_can_read(made: Made) -> None:
    assert made.settings.identity.api_keys is not None
    assert not made.settings.identity.allow_anonymous
    (volume,) = [one for one in made.templates[0]["spec"]["volumes"] if "secret" in one]
    (mount,) = [one for one in made.server["volumeMounts"] if one["name"] == volume["name"]]
    assert made.settings.identity.api_keys.startswith(f"{mount['mountPath']}/")
    # The server refuses a file that others may read.
    assert volume["secret"]["defaultMode"] & 0o027 == 0
    assert not any("secret" in one for template in made.templates[1:] for one in template["spec"]["volumes"])


def test_ports_are_those_of_the_settings(made: Made) -> None:
    listens = Address.parse(made.settings.server.listen)
    assert made.settings.server.metrics_listen is not None
    metrics = Address.parse(made.settings.server.metrics_listen)
    assert (listens.host, metrics.host) == ("0.0.0.0", "0.0.0.0")
    assert ports(made.server) == {"grpc": listens.port, "metrics": metrics.port}
    (service,) = made.of("Service")
    assert [one["targetPort"] for one in service["spec"]["ports"]] == ["grpc"]
    opened = [port["port"] for one in made.of("NetworkPolicy") for rule in one["spec"]["ingress"]
              for port in rule.get("ports", [])]  # fmt: skip
    assert sorted(opened) == ["grpc", "metrics"]


def test_probes_ask_what_the_server_answers(made: Made) -> None:
    port = ports(made.server)["grpc"]
    asked = {
        name: made.server[f"{name}Probe"]["grpc"] for name in ("startup", "readiness", "liveness")
    }  # fmt: skip
    assert {one["port"] for one in asked.values()} == {port}
    # Traffic by the overall state, restarts by liveness alone: a server that drains must not be killed for it.
    assert asked["readiness"].get("service", OVERALL) == OVERALL
    assert asked["startup"]["service"] == asked["liveness"]["service"] == LIVENESS


def test_a_start_gets_its_time(made: Made) -> None:
    probe = made.server["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == STARTS_WITHIN_S[made.name]


def test_a_drain_gets_its_time(made: Made) -> None:
    server = made.settings.server
    # Endpoints are told of a pod's end at the same time as the pod.
    assert server.drain_delay_s >= 5
    assert made.templates[0]["spec"]["terminationGracePeriodSeconds"] >= server.drain_s + server.drain_delay_s + 10


def test_selectors_find_their_pods(made: Made) -> None:
    server, *workers = made.templates
    for one in made.of("Deployment"):
        assert matches(one["spec"]["selector"]["matchLabels"], server)
    (service,) = made.of("Service")
    assert service["spec"]["clusterIP"] == "None"
    assert matches(service["spec"]["selector"], server)
    assert not any(matches(service["spec"]["selector"], one) for one in workers)
    (budget,) = made.of("PodDisruptionBudget")
    for selector in [budget["spec"]["selector"], *(one["spec"]["podSelector"] for one in made.of("NetworkPolicy"))]:
        assert all(matches(selector["matchLabels"], one) for one in made.templates)


def test_one_replica_can_still_be_moved(made: Made) -> None:
    (budget,) = made.of("PodDisruptionBudget")
    assert "minAvailable" not in budget["spec"]
    assert budget["spec"]["maxUnavailable"] >= 1


def test_every_container_is_confined(made: Made, image: dict[str, list[str]]) -> None:
    user, _, group = image["USER"][0].partition(":")
    for template in made.templates:
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == int(user)
        assert spec["securityContext"]["runAsGroup"] == spec["securityContext"]["fsGroup"] == int(group)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in containers(template):
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert one["resources"]["limits"]["memory"]


def test_what_is_written_goes_to_volumes(made: Made, image: dict[str, list[str]]) -> None:
    for template in made.templates:
        volumes = {one["name"]: one for one in template["spec"]["volumes"]}
        for one in containers(template):
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in one["volumeMounts"]}
            cache = mounts["/var/cache/saeguard"]
            assert cache["emptyDir"]["sizeLimit"]
            assert mounts["/tmp"]["emptyDir"]["sizeLimit"]
            for variable in one["env"]:
                if variable["name"].endswith("_CACHE_DIR"):
                    assert variable["value"].startswith("/var/cache/saeguard/")
    assert "HF_HOME=/var/cache/saeguard/" in image["ENV"][0]


def test_every_image_has_a_tag_of_its_kind(made: Made) -> None:
    tag = {"base": "dev", "overlays/gpu": "cuda"}.get(made.name, "vllm")
    assert {one["image"] for template in made.templates for one in containers(template)} == {f"saeguard:{tag}"}


def test_gpus_are_as_many_as_the_settings_use(made: Made) -> None:
    engine, spread = made.settings.engine, made.settings.engine.vllm
    groups = made.of("LeaderWorkerSet")
    pods = groups[0]["spec"]["leaderWorkerTemplate"]["size"] if groups else 1
    each = [int(template["spec"]["containers"][0]["resources"]["limits"].get(GPU, 0)) for template in made.templates]
    assert len(set(each)) == 1
    if engine.kind == "vllm":
        assert spread.tensor_parallel == each[0]
        assert spread.pipeline_parallel == pods
        assert spread.executor == ("ray" if pods > 1 else "mp")
    else:
        assert each[0] == (1 if made.settings.model.device.startswith("cuda") else 0)


def test_processes_that_share_work_share_memory(made: Made) -> None:
    for template in made.templates if made.settings.engine.kind == "vllm" else []:
        (mount,) = [one for one in template["spec"]["containers"][0]["volumeMounts"] if one["mountPath"] == "/dev/shm"]
        (volume,) = [one for one in template["spec"]["volumes"] if one["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"


def test_torch_takes_no_more_threads_than_the_container_has_cores(made: Made) -> None:
    cores = float(made.server["resources"]["limits"]["cpu"])
    assert made.settings.engine.kind == "vllm" or (made.settings.engine.threads or 0) <= cores
    assert made.settings.model.device != "cpu" or made.settings.engine.threads is not None


def test_the_monitor_finds_the_pods_under_the_name_that_alerts_know(
    deploy: Path, manifests: Callable[[str], list[Object]], rules: list[Object]
) -> None:
    file = deploy / "kubernetes" / "components" / "podmonitor" / "podmonitor.yaml"
    spec = yaml.safe_load(file.read_text())["spec"]
    (deployment,) = [one for one in manifests("base") if one["kind"] == "Deployment"]
    template = deployment["spec"]["template"]
    assert matches(spec["selector"]["matchLabels"], template)
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["port"] in ports(template["spec"]["containers"][0])
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["targetLabel"] == "job"
    assert any(f'up{{job="{relabeling["replacement"]}"}}' in rule["expr"] for rule in rules)
