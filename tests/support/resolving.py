"""Short ways to ask under policies, and to say what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

from saeguard.requests import GenerateRequest
from saeguard.types import Intervention
from saeguard_sae.edits import Affine
from saeguard_server.caller import Caller, Role
from saeguard_server.policy.resolve import Resolution, resolve_policies
from saeguard_server.policy.snapshot import Snapshot
from support.policy_shapes import NOW

InForce: TypeAlias = Callable[..., Snapshot]
"""Makes a snapshot of some policies."""
BOT = Caller("bot", frozenset({Role.GENERATE, Role.STEER}), tags=frozenset({"public"}))

READER = replace(BOT, roles=BOT.roles | {Role.POLICY_READ})
"""The same one, who may also read policies."""


def asks(*edits: Intervention, caller: Caller = BOT, **more: Any) -> tuple[GenerateRequest, Caller]:
    """A request and who makes it."""
    return GenerateRequest(input="x", interventions=edits, **more), caller


def resolved(snapshot: Snapshot, *edits: Intervention, caller: Caller = BOT, **more: Any) -> Resolution:
    """What becomes of it."""
    return resolve_policies(*asks(*edits, caller=caller, **more), snapshot, NOW)


def made(found: Resolution) -> list[tuple[str, str, int, str, Affine]]:
    """Policy, rule, feature, kind and map of each edit; shadows with a tilde."""
    return [
        ("~" * edit.is_shadow + edit.origin.policy, edit.origin.rule, edit.feature, edit.kind, edit.affine)
        for edit in found.edits
    ]
