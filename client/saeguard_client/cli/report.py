"""Results as one line for people and as JSON for programs."""

from __future__ import annotations

import json
from array import array
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any

from saeguard_client.cli.terminal import safe
from saeguard_client.results import Completion, InterventionReceipt, TriggerReceipt


def summary(completion: Completion) -> str:
    """What happened, on one line: why it ended, how much, how long, what was edited."""
    usage, receipt = completion.usage, completion.receipt
    parts = [
        _reason(completion),
        f"{usage.prompt_tokens} + {usage.generated_tokens} tokens",
        f"{completion.timings.total_s:.2f} s",
        f"seed {completion.seed}",
    ]
    if receipt is not None:
        parts.extend(_edit(one) for one in receipt.interventions)
        parts.extend(_trigger(one) for one in receipt.triggers)
        parts.append(f"steering {receipt.steering_digest[:12]}")
    if completion.policy is not None:
        parts.append(f"policies of revision {completion.policy.revision}")
    return safe(" | ".join(parts), keep="")


def as_json(value: object) -> str:
    """One JSON value; what JSON cannot hold (NaN, infinity) is null."""
    return json.dumps(plain(value), allow_nan=False)


def plain(value: Any) -> Any:
    """Dataclasses as objects, sequences and arrays as lists."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | array):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _reason(completion: Completion) -> str:
    by = completion.stopped_by
    return completion.finish_reason if by is None else f"stopped by {_whose(by.policy, by.name)}"


def _whose(policy: str, name: str) -> str:
    return f"{policy}/{name}" if policy else name


def _trigger(one: TriggerReceipt) -> str:
    fired = "did not fire" if one.first_position is None else f"fired at position {one.first_position}"
    return f"{'shadow ' if one.is_shadow else ''}{_whose(one.policy, one.name)} {fired}"


def _edit(one: InterventionReceipt) -> str:
    whose = f"{'shadow ' if one.is_shadow else ''}{_whose(one.policy, one.rule)}: " if one.policy else ""
    done = f"{whose}{one.kind} {one.sae}:{one.feature} edited {one.tokens_edited}/{one.tokens_eligible} tokens"
    size = f", mean size {one.mean_relative_edit:.2g} of |x|"
    return done + size + (f", {one.tokens_capped} capped" if one.tokens_capped else "")
