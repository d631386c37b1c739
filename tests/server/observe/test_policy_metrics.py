"""What receipts tell of rules, as series with few labels."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from saeguard.results import Completion, InterventionReceipt, Receipt, StoppedBy, Timings, TriggerReceipt, Usage
from saeguard_server.observe import PolicyMetrics


def edit(policy: str, rule: str, *, edited: int = 2, shadow: bool = False) -> InterventionReceipt:
    return InterventionReceipt(
        "a", 3, "zero", "d", "resid_post.1", 10, edited, 0.5, 4.0, 0.1, 1, policy, rule, is_shadow=shadow
    )


def done(edits: list[InterventionReceipt], triggers: list[TriggerReceipt], by: StoppedBy | None = None) -> Completion:
    receipt = Receipt("m", "s", tuple(edits), 3, tuple(triggers))
    return Completion(
        finish_reason="feature" if by else "stop", usage=Usage(3, 7), timings=Timings(0, 0, 0), receipt=receipt, seed=1,
        stopped_by=by,
    )  # fmt: skip


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def value(registry: CollectorRegistry, name: str, policy: str, rule: str, mode: str = "enforce") -> float | None:
    return registry.get_sample_value(f"saeguard_policy_rule_{name}", {"policy": policy, "rule": rule, "mode": mode})


def test_rules_are_counted_by_what_their_receipts_say(registry: CollectorRegistry) -> None:
    metrics = PolicyMetrics(registry)
    fired = TriggerReceipt("calm", "secret", False, 10, 2, 5, 3.0)
    quiet = TriggerReceipt("calm", "quiet", False, 10, 0, None, 0.0)
    metrics.observe(done([edit("calm", "flattery"), edit("", "")], [fired, quiet], StoppedBy("calm", "secret")))
    metrics.observe(done([edit("calm", "flattery", edited=0), edit("calm", "flattery", shadow=True)], []))
    assert value(registry, "evaluated_tokens_total", "calm", "flattery") == 20
    assert value(registry, "edited_tokens_total", "calm", "flattery") == 2
    assert value(registry, "fired_requests_total", "calm", "flattery") == 1
    assert value(registry, "edited_tokens_total", "calm", "flattery", "shadow") == 2
    assert value(registry, "activation_count", "calm", "flattery") == 2
    assert value(registry, "stops_total", "calm", "secret") == 1
    assert value(registry, "fired_requests_total", "calm", "quiet") is None
    assert value(registry, "evaluated_tokens_total", "", "") is None


def test_a_request_without_a_receipt_counts_nothing(registry: CollectorRegistry) -> None:
    PolicyMetrics(registry).observe(done([], []))


def test_series_of_rules_that_are_gone_go_too(registry: CollectorRegistry) -> None:
    metrics = PolicyMetrics(registry)
    metrics.observe(done([edit("calm", "flattery"), edit("old", "rule")], []))
    metrics.keep([("calm", "flattery")])
    assert value(registry, "edited_tokens_total", "old", "rule") is None
    assert value(registry, "edited_tokens_total", "calm", "flattery") == 2


def test_further_rules_are_counted_together(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeguard_server.observe.MAX_RULES", 2)
    metrics = PolicyMetrics(registry)
    metrics.observe(done([edit("p", f"r{index}") for index in range(5)], []))
    assert value(registry, "edited_tokens_total", "p", "r1") == 2
    assert value(registry, "edited_tokens_total", "p", "r2") is None
    assert value(registry, "edited_tokens_total", "other", "other") == 6
