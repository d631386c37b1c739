"""Short ways to ask under policies, and to say what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from saeguard_sae.edits import Affine, Edit
from saeguard_server.caller import Caller, Role
from saeguard_server.interventions import FeatureRef, Intervention
from saeguard_server.policy.compile import Snapshot
from saeguard_server.policy.resolve import Resolution, resolve_policies
from saeguard_server.request import GenerationRequest, TextInput
from support.policy_shapes import NOW

InForce: TypeAlias = Callable[..., Snapshot]
"""Makes a snapshot of some policies."""
BOT = Caller("bot", frozenset({Role.GENERATE, Role.STEER}), tags=frozenset({"public"}))


def edit(kind: Edit, feature: int = 2, sae: str = "mid", **more: Any) -> Intervention:
    """An edit of a feature that the fake engine's SAE has."""
    return Intervention(FeatureRef(sae, feature), kind, **more)


def asks(*edits: Intervention, caller: Caller = BOT, **more: Any) -> tuple[GenerationRequest, Caller]:
    """A request and who makes it."""
    return GenerationRequest(prompt=TextInput("x"), interventions=edits, **more), caller


def resolved(snapshot: Snapshot, *edits: Intervention, caller: Caller = BOT, **more: Any) -> Resolution:
    """What becomes of it."""
    return resolve_policies(*asks(*edits, caller=caller, **more), snapshot, NOW)


def made(found: Resolution) -> list[tuple[str, str, int, str, Affine]]:
    """Policy, rule, feature, kind and map of each edit; shadows with a tilde."""
    edits = [one.edit for one in found.edits]  # type: ignore[attr-defined]
    return [
        ("~" * one.is_shadow + one.origin.policy, one.origin.rule, one.feature, one.kind, one.affine) for one in edits
    ]
