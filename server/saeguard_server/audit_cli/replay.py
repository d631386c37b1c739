"""A recorded request as the client's arguments, and whether its answer is the recorded one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import saeguard_client as client
from saeguard_client.interventions import KINDS
from saeguard_server.guard.audit.record import again
from saeguard_server.guard.audit.veil import digest
from saeguard_server.interventions import Action, Apply, Condition, Intervention, Scope, Stop
from saeguard_server.request import TextInput


def request_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What ``Client.generate`` takes beside the prompt, with the seed that was used.

    Raises:
        ValueError: the record is not of a request.
    """
    asked = again(record["asked"], TextInput("-"))
    sampling = {field.name: getattr(asked.sampling, field.name) for field in fields(asked.sampling)}
    return {
        **sampling,
        "seed": record["seed"],
        "steer": [_intervention(one) for one in asked.interventions],
        "max_relative_edit": asked.max_relative_edit,
        "watch": [client.FeatureRef(one.sae, one.feature) for one in asked.watch],
        "triggers": [client.Trigger(one.name, _condition(one.when), _action(one.action)) for one in asked.triggers],
        "policies": asked.policies,
        "conversation": asked.conversation or None,
    }


def compare(record: Mapping[str, Any], done: client.Completion) -> list[str]:
    """What is not as recorded; empty where the request was answered alike."""
    return list(_differences(record, done))


def _differences(record: Mapping[str, Any], done: client.Completion) -> Iterator[str]:
    told = record["policy"]
    if told is not None and (done.policy is None or told["revision"] != done.policy.revision):
        now = "none" if done.policy is None else done.policy.revision
        yield f"policy revision {told['revision']} was in force, now it is {now}"
    then_and_now: tuple[tuple[str, Any, Any], ...] = (
        ("outcome", record["outcome"], done.finish_reason),
        ("prompt tokens", record.get("prompt_tokens"), done.usage.prompt_tokens),
        ("generated tokens", record.get("generated_tokens"), done.usage.generated_tokens),
        ("model", record.get("model"), done.receipt.model_digest if done.receipt else None),
        ("steering", record.get("steering"), done.receipt.steering_digest if done.receipt else None),
    )
    for name, was, now in then_and_now:
        if was != now:
            yield f"{name}: {was} then, {now} now"
    if "answer_sha256" in record and record["answer_sha256"] != digest([token.id for token in done.tokens]):
        yield "the tokens are others"


def _intervention(one: Intervention) -> client.Intervention:
    operands = {field.name: getattr(one.edit, field.name) for field in fields(one.edit)}
    when = None if one.when is None else _condition(one.when)
    kind: Any = KINDS[one.edit.kind]
    made: client.Intervention = kind(one.target.sae, one.target.feature, **operands, scope=_scope(one.scope), when=when)
    return made


def _condition(one: Condition) -> client.Condition:
    return client.Condition(
        terms=tuple(client.Term(term.feature.sae, term.feature.feature, term.weight) for term in one.terms),
        threshold=one.threshold,
        comparison=one.comparison,
        bias=one.bias,
        release=one.release,
        unit=one.unit,
        window=client.Window(one.window.kind, one.window.tokens, one.window.k),
        scope=_scope(one.scope),
    )


def _scope(one: Scope) -> client.Scope:
    return client.Scope(
        phase=one.phase, start=one.start, end=one.end, include_special_tokens=one.include_special_tokens
    )


def _action(one: Action) -> client.Flag | client.Stop | client.Apply:
    if isinstance(one, Apply):
        return client.Apply([_intervention(edit) for edit in one.interventions])
    return client.Stop() if isinstance(one, Stop) else client.Flag()
