"""What operators see: metrics and logs, each declared once."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from saeguard.results import Completion, InterventionReceipt, TriggerReceipt
from saeguard_server.settings import Address, BadSettings

# What policies' rules do, counted from receipts. Labels are names of rules in force, and so many at most.


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


# Every metric, declared once. Labels are names that the server chose: never a caller's text.


RPC_LABELS = ("grpc_type", "grpc_service", "grpc_method")

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHARES = (0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)


class Metrics:
    """What the server counts, in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._declare_load(registry)
        self._declare_work(registry)
        self._declare_steering(registry)
        self._declare_saes(registry)
        self._declare_policies(registry)
        self.policy_rules = PolicyMetrics(registry)
        self._declare_audit(registry)
        self._declare_rpcs(registry)

    def _declare_load(self, registry: CollectorRegistry) -> None:
        self.queue_length = Gauge("saeguard_queue_length", "Requests that wait for a slot", registry=registry)
        self.turns_waiting = Gauge(
            "saeguard_turns_waiting", "Requests that wait for their caller's turn, before that queue", registry=registry
        )
        self.running_requests = Gauge("saeguard_running_requests", "Requests that hold a slot", registry=registry)
        self.slots_in_use = Gauge("saeguard_slots_in_use", "Slots of the batch that are taken", registry=registry)
        self.kv_blocks_in_use = Gauge(
            "saeguard_kv_blocks_in_use", "Blocks of 16 tokens of KV memory that a request holds", registry=registry
        )
        self.preemptions = Counter(
            "saeguard_preemptions", "Times a request gave its KV memory up and was read again", registry=registry
        )
        self.refusals = Counter(
            "saeguard_refusals", "Requests refused before any work, by reason", ["reason"], registry=registry
        )

    def _declare_work(self, registry: CollectorRegistry) -> None:
        self.batch_size = Histogram("saeguard_batch_size", "Rows of a decode step", buckets=ROWS, registry=registry)
        self.prompt_tokens = Counter("saeguard_prompt_tokens", "Prompt tokens read", registry=registry)
        self.reused_tokens = Counter(
            "saeguard_prompt_tokens_reused", "Prompt tokens not read, as one like them had been", registry=registry
        )
        self.generated_tokens = Counter("saeguard_generated_tokens", "Tokens generated", registry=registry)
        self.steps = Counter("saeguard_steps", "Forward passes of the batch", registry=registry)
        self.engine_restarts = Counter("saeguard_engine_restarts", "Times the engine was restarted", registry=registry)
        self.time_to_first_token = Histogram(
            "saeguard_time_to_first_token_seconds", "From submission to the first token", buckets=LONG_S,
            registry=registry,
        )  # fmt: skip
        self.time_per_output_token = Histogram(
            "saeguard_time_per_output_token_seconds", "Between two tokens of one request", buckets=SHORT_S,
            registry=registry,
        )  # fmt: skip

    def _declare_steering(self, registry: CollectorRegistry) -> None:
        self.tokens_edited = Counter(
            "saeguard_tokens_edited", "Tokens whose feature value an edit changed", ["sae", "kind"], registry=registry
        )
        self.relative_edit = Histogram(
            "saeguard_relative_edit", "Mean |edit| / |x| of an edit in a finished request", ["sae"], buckets=SHARES,
            registry=registry,
        )  # fmt: skip

    def _declare_saes(self, registry: CollectorRegistry) -> None:
        """What the check at start measured on this model."""
        self.sae_l0 = Gauge("saeguard_sae_l0", "Features that fire on a token, mean", ["sae"], registry=registry)
        self.sae_fvu = Gauge(
            "saeguard_sae_fvu", "Share of the activations' variance left unexplained", ["sae"], registry=registry
        )
        self.sae_ce_increase = Gauge(
            "saeguard_sae_ce_increase_nats", "Rise of the model's cross-entropy with the SAE spliced in", ["sae"],
            registry=registry,
        )  # fmt: skip

    def _declare_policies(self, registry: CollectorRegistry) -> None:
        """What is in force here, and how well this server follows it."""
        self.policy_revision = Gauge("saeguard_policy_revision", "Revision that is enforced here", registry=registry)
        self.policy_activation = Gauge(
            "saeguard_policy_activation", "Activation that put it in force", registry=registry
        )
        self.policy_activation_time = Gauge(
            "saeguard_policy_activation_time_seconds", "When that was, as Unix time", registry=registry
        )
        self.policy_sync_age = Gauge(
            "saeguard_policy_sync_age_seconds", "Since the policy store was last read successfully", registry=registry
        )
        self.policy_apply_lag = Histogram(
            "saeguard_policy_apply_lag_seconds", "From an activation, by its author's clock, until it is enforced here",
            buckets=LONG_S, registry=registry,
        )  # fmt: skip
        self.policy_sync_failures = Counter(
            "saeguard_policy_sync_failures", "Failed attempts to follow the policy store, by reason", ["reason"],
            registry=registry,
        )  # fmt: skip

    def _declare_audit(self, registry: CollectorRegistry) -> None:
        self.audit_records = Counter("saeguard_audit_records", "Audit records written", registry=registry)
        self.audit_failures = Counter(
            "saeguard_audit_failures", "Times the audit could not be written", registry=registry
        )

    def _declare_rpcs(self, registry: CollectorRegistry) -> None:
        """The names that gRPC dashboards expect, whatever the language of the server."""
        self.rpcs_started = Counter("grpc_server_started", "RPCs started", RPC_LABELS, registry=registry)
        self.rpcs_handled = Counter(
            "grpc_server_handled", "RPCs completed, by status code", [*RPC_LABELS, "grpc_code"], registry=registry
        )
        self.messages_received = Counter("grpc_server_msg_received", "Messages received", RPC_LABELS, registry=registry)
        self.messages_sent = Counter("grpc_server_msg_sent", "Messages sent", RPC_LABELS, registry=registry)
        self.handling_seconds = Histogram(
            "grpc_server_handling_seconds", "Time to complete an RPC", RPC_LABELS, buckets=LONG_S, registry=registry
        )


# Serves /metrics over HTTP on its own port, so that it can be kept from callers.


class Exporter:
    """A running /metrics endpoint; a context manager that stops it."""

    def __init__(self, registry: CollectorRegistry, address: Address) -> None:
        """Listens at once.

        Raises:
            BadSettings: the address cannot be used.
        """
        try:
            self._server, self._thread = start_http_server(address.port, address.host, registry)
        except OSError as err:
            raise BadSettings(f"server.metrics_listen: {address}: {err.strerror}") from err

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.server_port

    def __enter__(self) -> Exporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# Logs as JSON, one object a line, with the request's id in each. What callers send and get is never in them.
#
# An exception is logged as its type and where it happened: its message can quote a prompt.


REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object; ``extra={"fields": {...}}`` adds to it.

    Args:
        with_messages: also log the messages of exceptions, for debugging only.
    """

    def __init__(self, *, with_messages: bool = False) -> None:
        super().__init__()
        self._with_messages = with_messages

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": REQUEST_ID.get(),
        }
        entry |= vars(record).get("fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            entry["exception"] = self._chain(record.exc_info[1])
        return json.dumps(entry, default=str)

    def _chain(self, error: BaseException) -> list[dict[str, Any]]:
        """The error and what it came from, innermost last."""
        chain: list[dict[str, Any]] = []
        at: BaseException | None = error
        while at is not None and len(chain) < 8:
            frames = traceback.extract_tb(at.__traceback__)
            said = {"message": str(at)} if self._with_messages else {}
            where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
            chain.append({"type": type(at).__name__, "frames": where} | said)
            at = at.__cause__ or at.__context__
        return chain


def configure_logs(level: str, stream: IO[str]) -> logging.Handler:
    """Sends the process's logs to ``stream``; returns the handler so that a test can take it off again."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(with_messages=level == "debug"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())
    return handler
