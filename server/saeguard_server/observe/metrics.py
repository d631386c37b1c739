"""Every metric, declared once. Labels are names that the server chose: never a caller's text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from saeguard_server.observe.policy_metrics import PolicyMetrics

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
