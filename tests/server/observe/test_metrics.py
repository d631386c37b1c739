"""Metrics: declared once, under names that dashboards can rely on, with labels that callers cannot grow."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from saeguard_server.observe import Exporter, Metrics
from saeguard_server.settings import Address, BadSettings

FOR_THE_ENGINE = {
    "queue_length", "running_requests", "slots_in_use", "kv_blocks_in_use", "preemptions", "reused_tokens",
    "batch_size", "prompt_tokens", "generated_tokens", "steps",
    "engine_restarts", "time_to_first_token", "time_per_output_token", "tokens_edited", "relative_edit", "refusals",
    "sae_l0", "sae_fvu", "sae_ce_increase",
}  # fmt: skip
LABELS = {"grpc_type", "grpc_service", "grpc_method", "grpc_code", "sae", "kind", "reason"}


def test_names_and_labels(metrics: Metrics) -> None:
    found = {name: one for name, one in vars(metrics).items() if isinstance(one, MetricWrapperBase)}
    assert found.keys() >= FOR_THE_ENGINE
    for name, one in found.items():
        # The names of RPC metrics are everybody's; all others are ours.
        assert one._name.startswith(("saeguard_", "grpc_server_"))
        assert one._name.startswith("saeguard_") or name not in FOR_THE_ENGINE
        assert set(one._labelnames) <= LABELS
        assert one._documentation
    rpcs = {one._name for one in found.values() if one._name.startswith("grpc_")}
    assert rpcs == {
        "grpc_server_started", "grpc_server_handled", "grpc_server_msg_received", "grpc_server_msg_sent",
        "grpc_server_handling_seconds",
    }  # fmt: skip


def test_two_servers_in_one_process_do_not_share() -> None:
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    first.steps.inc()
    assert second.steps._value.get() == 0


def test_the_endpoint_serves_and_stops(metrics: Metrics) -> None:
    metrics.generated_tokens.inc(3)
    with Exporter(metrics.registry, Address("127.0.0.1", 0)) as exporter:
        port = exporter.port
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
            assert b"saeguard_generated_tokens_total 3.0" in reply.read()
        with pytest.raises(BadSettings, match="metrics_listen"):
            Exporter(metrics.registry, Address("127.0.0.1", port))
    with Exporter(metrics.registry, Address("127.0.0.1", port)):
        pass
