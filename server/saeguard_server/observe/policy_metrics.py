"""What policies' rules do, counted from receipts. Labels are names of rules in force, and so many at most."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram

from saeguard_server.reply import Completion, InterventionReceipt, TriggerReceipt

MAX_RULES = 2000
"""Rules with series of their own; those of further ones are counted together."""
OTHER = "other"
ACTIVATIONS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
NATS = (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

_RULE = ("policy", "rule", "mode")


class PolicyMetrics:
    """One series per rule and mode ("enforce" or "shadow": what would have happened)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"saeguard_policy_rule_{name}", text, _RULE, registry=registry)

        self._evaluated = counter("evaluated_tokens", "Tokens in a rule's scope that the model read")
        self._fired = counter("fired_requests", "Requests in which a rule edited, or its condition held")
        self._edited = counter("edited_tokens", "Tokens whose feature value a rule changed, or would have")
        self._capped = counter("capped_tokens", "Tokens on which a limit made a rule's edit smaller")
        self._stops = counter("stops", "Generations that a rule ended")
        self._activation = Histogram(
            "saeguard_policy_rule_activation", "Largest value of a rule's feature in a request, before the edit", _RULE,
            buckets=ACTIVATIONS, registry=registry,
        )  # fmt: skip
        self._counterfactual = Histogram(
            "saeguard_policy_counterfactual_kl_nats", "Mean KL per token of an edited answer from the unedited model",
            ["policy"], buckets=NATS, registry=registry,
        )  # fmt: skip
        self._known: set[tuple[str, str, str]] = set()

    def observe(self, done: Completion) -> None:
        """Counts a finished request."""
        if done.receipt is None:
            return
        for edit in done.receipt.interventions:
            if edit.policy:
                self._edit(edit)
        for trigger in done.receipt.triggers:
            if trigger.policy:
                self._trigger(trigger)
        if done.stopped_by is not None and done.stopped_by.policy:
            by = done.stopped_by
            self._stops.labels(*self._labels(by.policy, by.name, is_shadow=False)).inc()

    def observe_counterfactual(self, policy: str, kl_nats: float) -> None:
        """The mean over a request's tokens of what a policy changed, in nats."""
        self._counterfactual.labels(policy).observe(kl_nats)

    def keep(self, rules: Iterable[tuple[str, str]]) -> None:
        """Forgets the series of rules that are no longer in force: pairs of policy and rule stay."""
        wanted = set(rules)
        for labels in [one for one in self._known if one[:2] not in wanted and one[0] != OTHER]:
            self._known.discard(labels)
            for metric in (self._evaluated, self._fired, self._edited, self._capped, self._stops, self._activation):
                if labels in metric._metrics:
                    metric.remove(*labels)

    def _edit(self, one: InterventionReceipt) -> None:
        labels = self._labels(one.policy, one.rule, is_shadow=one.is_shadow)
        self._evaluated.labels(*labels).inc(one.tokens_eligible)
        self._edited.labels(*labels).inc(one.tokens_edited)
        self._capped.labels(*labels).inc(one.tokens_capped)
        self._activation.labels(*labels).observe(one.max_activation)
        if one.tokens_edited:
            self._fired.labels(*labels).inc()

    def _trigger(self, one: TriggerReceipt) -> None:
        labels = self._labels(one.policy, one.name, is_shadow=one.is_shadow)
        self._evaluated.labels(*labels).inc(one.tokens_evaluated)
        if one.first_position is not None:
            self._fired.labels(*labels).inc()

    def _labels(self, policy: str, rule: str, *, is_shadow: bool) -> tuple[str, str, str]:
        labels = (policy, rule, "shadow" if is_shadow else "enforce")
        if labels not in self._known:
            if len(self._known) >= MAX_RULES:
                return (OTHER, OTHER, labels[2])
            self._known.add(labels)
        return labels
