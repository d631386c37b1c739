"""What a record says of a request: everything that is needed to run it again, but the text."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec

from saeguard_sae.edits import KINDS
from saeguard_server.interventions import (
    Action,
    Apply,
    Condition,
    FeatureRef,
    Flag,
    Intervention,
    Scope,
    Stop,
    Trigger,
)
from saeguard_server.reply import Completion, PolicyFacts
from saeguard_server.request import Call, GenerationRequest, ModelInput, Sampling

_ACTIONS: dict[str, Action] = {"flag": Flag(), "stop": Stop()}


def asked(request: GenerationRequest) -> dict[str, Any]:
    """What was asked for, without the prompt; ``again`` reads it back."""
    return {
        "sampling": msgspec.to_builtins(request.sampling),
        "interventions": [_intervention(one) for one in request.interventions],
        "max_relative_edit": request.max_relative_edit,
        "watch": [msgspec.to_builtins(one) for one in request.watch],
        "triggers": [_trigger(one) for one in request.triggers],
        "policies": list(request.policies),
        "conversation": request.conversation,
    }


def again(told: dict[str, Any], prompt: ModelInput) -> GenerationRequest:
    """The same request with the prompt put back.

    Raises:
        ValueError: that is not what ``asked`` gave.
    """
    try:
        return GenerationRequest(
            prompt=prompt,
            sampling=msgspec.convert(told["sampling"], Sampling),
            interventions=tuple(_intervention_of(one) for one in told["interventions"]),
            max_relative_edit=told["max_relative_edit"],
            watch=tuple(msgspec.convert(one, FeatureRef) for one in told["watch"]),
            triggers=tuple(_trigger_of(one) for one in told["triggers"]),
            policies=tuple(told["policies"]),
            conversation=told["conversation"],
        )
    except (KeyError, TypeError) as err:
        raise ValueError(f"not a record of a request: {err}") from err


def asked_by(call: Call, request: GenerationRequest, *, is_comparison: bool) -> dict[str, Any]:
    """Who asked for what; a comparison also shows what policies suppress."""
    told = {"request_id": call.request_id, "caller": call.caller.name, "asked": asked(request)}
    return {**told, "is_comparison": True} if is_comparison else told


def admitted(told: dict[str, Any], facts: PolicyFacts | None, seed: int) -> dict[str, Any]:
    """That, and which policies decide."""
    return {**told, "policy": None if facts is None else msgspec.to_builtins(facts), "seed": seed}


def finished(told: dict[str, Any], done: Completion) -> dict[str, Any]:
    """That, and what was done."""
    receipt = done.receipt
    return {
        **told,
        "outcome": done.finish_reason,
        "stopped_by": None if done.stopped_by is None else msgspec.to_builtins(done.stopped_by),
        "prompt_tokens": done.prompt_tokens,
        "generated_tokens": done.generated_tokens,
        "model": None if receipt is None else receipt.model_digest,
        "steering": None if receipt is None else receipt.steering_digest,
        "edits": [] if receipt is None else [_finite(msgspec.to_builtins(one)) for one in receipt.interventions],
        "triggers": [] if receipt is None else [_finite(msgspec.to_builtins(one)) for one in receipt.triggers],
        "total_s": done.timings.total_s,
    }


def _intervention(one: Intervention) -> dict[str, Any]:
    return {
        "sae": one.target.sae,
        "feature": one.target.feature,
        "kind": one.edit.kind,
        "edit": {field.name: getattr(one.edit, field.name) for field in fields(one.edit)},
        "scope": msgspec.to_builtins(one.scope),
        "when": None if one.when is None else msgspec.to_builtins(one.when),
    }


def _intervention_of(told: dict[str, Any]) -> Intervention:
    when = told["when"]
    return Intervention(
        FeatureRef(told["sae"], told["feature"]),
        KINDS[told["kind"]](**told["edit"]),
        msgspec.convert(told["scope"], Scope),
        None if when is None else msgspec.convert(when, Condition),
    )


def _trigger(one: Trigger) -> dict[str, Any]:
    action: Any = type(one.action).__name__.lower()
    if isinstance(one.action, Apply):
        action = [_intervention(edit) for edit in one.action.interventions]
    return {"name": one.name, "when": msgspec.to_builtins(one.when), "action": action}


def _trigger_of(told: dict[str, Any]) -> Trigger:
    action = told["action"]
    return Trigger(
        told["name"],
        msgspec.convert(told["when"], Condition),
        _ACTIONS[action] if isinstance(action, str) else Apply(tuple(_intervention_of(one) for one in action)),
    )


def _finite(told: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity: a maximum over nothing is left out."""
    return {name: value for name, value in told.items() if value not in (float("inf"), float("-inf"))}
