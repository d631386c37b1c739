"""From what a request's callers and policies want to what the engine applies: names found, positions reachable.

What does not depend on the request is prepared first, so that a policy's part can be kept; ``steer`` puts the prepared
parts together for one request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

from saeguard_sae.edit_table import FOREVER
from saeguard_sae.edits import FLOAT32_MAX, Affine, Unit
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import depth
from saeguard_server.engine.protocol import Engine, ResolvedEdit, ResolvedGuard, Steering
from saeguard_server.errors import InvalidRequest
from saeguard_server.flows.conditions import PreparedGuard, digest, prepare_guard
from saeguard_server.flows.reach import Reach
from saeguard_server.flows.served import check_editable, find_feature, raw_per_unit
from saeguard_server.interventions import Apply, Intervention, Origin, Scope, Stop, Trigger, Wanted, WantedTrigger


@dataclass(frozen=True, slots=True, eq=False)
class PreparedEdit:
    """An edit of which all is known but the request's positions."""

    edit: ResolvedEdit
    """In raw units; at the positions of a scope without a phase, and without its gate's number."""
    scope: Scope
    gate: PreparedGuard | None
    field: str
    part: str
    """Hash of what it is, for the steering's digest."""

    @property
    def affine(self) -> Affine:
        """What is done to the feature, in raw units."""
        return self.edit.affine

    def placed(self, reach: Reach, gate: int | None) -> ResolvedEdit:
        """The edit on one request's tokens.

        Raises:
            InvalidRequest: a request's own edit holds none of them.
        """
        if not self.edit.origin.policy:
            reach.check(self.scope, f"{self.field}.scope")
        if self.scope.phase == "all" and gate is None:
            return self.edit
        first, last = reach.place(self.scope)
        return replace(self.edit, first=first, last=last, gate=gate)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedTrigger:
    """A trigger's guard, and the edits that it makes from when it fires on."""

    guard: PreparedGuard
    edits: tuple[PreparedEdit, ...]


def prepare_edit(engine: Engine, wanted: Wanted) -> PreparedEdit:
    """An intervention as the engine can make it.

    Raises:
        UnknownName, InvalidRequest: the field that cannot be applied as it stands.
    """
    when, gate = wanted.intervention.when, None
    if when is not None:
        gate = prepare_guard(engine, when, f"{wanted.field}.when", Origin(wanted.origin.policy))
    return _prepare(engine, wanted, gate)


def prepare_trigger(engine: Engine, wanted: WantedTrigger) -> PreparedTrigger:
    """A trigger as the engine can decide it, with its edits.

    Raises:
        UnknownName, InvalidRequest: the field that cannot be decided or applied as it stands.
    """
    one, action = wanted.trigger, wanted.trigger.action
    guard = prepare_guard(
        engine, one.when, f"{wanted.field}.when", wanted.origin, is_trigger=True, is_shadow=wanted.is_shadow,
        latches=isinstance(action, Apply), stops=isinstance(action, Stop) and not wanted.is_shadow,
    )  # fmt: skip
    edits = action.interventions if isinstance(action, Apply) else ()
    wants = (
        Wanted(
            intervention=edit,
            field=f"{wanted.field}.apply.interventions[{index}]",
            origin=wanted.origin,
            is_shadow=wanted.is_shadow,
            is_limited=wanted.is_limited,
        )
        for index, edit in enumerate(edits)
    )
    return PreparedTrigger(guard, tuple(_prepare(engine, edit, guard) for edit in wants))


def steer(
    edits: Sequence[PreparedEdit], triggers: Sequence[PreparedTrigger], max_relative_edit: float | None, reach: Reach
) -> Steering:
    """What the engine applies to one request: the edits in this order, then those of the triggers.

    Args:
        max_relative_edit: of all edits that are limited together; None does not limit them.

    Raises:
        InvalidRequest: a scope of the request's own holds no token, two edits would change one feature of one token,
            or there is nothing to limit.
    """
    every = [*edits, *(edit for one in triggers for edit in one.edits)]
    if max_relative_edit is not None and not any(one.edit.is_limited for one in every):
        raise InvalidRequest("max_relative_edit", "has nothing to limit: there are no interventions")
    if not every and not triggers:
        return Steering()
    guards = _Guards(reach)
    for trigger in triggers:
        trigger.guard.check(reach)
        guards.add(trigger.guard, trigger.guard)
    placed = tuple(one.placed(reach, None if one.gate is None else guards.find(one.gate)) for one in every)
    _check_disjoint(placed, every)
    parts = sorted([one.part for one in every] + [one.guard.part for one in triggers])
    whole = hashlib.sha256(json.dumps([parts, max_relative_edit]).encode()).hexdigest()
    return Steering(placed, inf if max_relative_edit is None else max_relative_edit, whole, tuple(guards.placed))


def resolve(
    engine: Engine,
    interventions: tuple[Intervention, ...],
    max_relative_edit: float | None,
    reach: Reach,
    triggers: tuple[Trigger, ...] = (),
) -> Steering:
    """The steering of a request on which no policy acts.

    Raises:
        UnknownName, InvalidRequest: the field that cannot be applied as it stands.
    """
    return steer(
        [prepare_edit(engine, one) for one in wanted_edits(interventions)],
        [prepare_trigger(engine, one) for one in wanted_triggers(triggers)],
        max_relative_edit,
        reach,
    )


def wanted_edits(interventions: Iterable[Intervention]) -> tuple[Wanted, ...]:
    """A request's own."""
    return tuple(Wanted(intervention=one, field=f"interventions[{index}]") for index, one in enumerate(interventions))


def wanted_triggers(triggers: Iterable[Trigger]) -> tuple[WantedTrigger, ...]:
    """A request's own."""
    return tuple(
        WantedTrigger(trigger=one, field=f"triggers[{index}]", origin=Origin(rule=one.name))
        for index, one in enumerate(triggers)
    )


def may_stop(triggers: Iterable[PreparedTrigger], position: int, prompt_tokens: int) -> bool:
    """Whether one could stop the token at a position: then the model reads it even if it is the last."""
    scopes = (one.guard.scope.positions(prompt_tokens) for one in triggers if one.guard.guard.stops)
    return any(first <= position and (last is None or position < last) for first, last in scopes)


class _Guards:
    """The guards of one request: a trigger's are its own, equal ones of edits are shared."""

    def __init__(self, reach: Reach) -> None:
        self.placed: list[ResolvedGuard] = []
        self._reach = reach
        self._known: dict[object, int] = {}

    def add(self, guard: PreparedGuard, key: object) -> int:
        self._known[key] = len(self.placed)
        self.placed.append(guard.placed(self._reach))
        return self._known[key]

    def find(self, guard: PreparedGuard) -> int:
        guard.check(self._reach)
        key = guard if guard in self._known else guard.part
        return self._known[key] if key in self._known else self.add(guard, key)


def _prepare(engine: Engine, wanted: Wanted, gate: PreparedGuard | None) -> PreparedEdit:
    one, field = wanted.intervention, wanted.field
    sae, kind = find_feature(engine, one.target, field), one.edit.kind
    if kind not in engine.capabilities.kinds:
        raise InvalidRequest(f"{field}.{kind}", f"the {engine.capabilities.engine} engine cannot apply it")
    check_editable(engine, sae, f"{field}.sae")
    if gate is not None:
        _check_order(sae, gate, field)
    affine = _affine(one, sae, field) if wanted.affine is None else wanted.affine
    last = FOREVER if one.scope.end is None else one.scope.end
    edit = ResolvedEdit(
        one.target.sae, one.target.feature, kind, affine, one.scope.start, last, one.scope.include_special_tokens,
        is_shadow=wanted.is_shadow, is_limited=wanted.is_limited, origin=wanted.origin,
    )  # fmt: skip
    return PreparedEdit(edit, one.scope, gate, field, _part(edit, one.scope, sae, gate))


def _check_order(sae: LoadedSae, gate: PreparedGuard, field: str) -> None:
    """A condition is decided where its last feature is read: what was written before cannot wait for it."""
    first = min(sae.write_sites, key=depth)
    if depth(first) < depth(gate.site):
        raise InvalidRequest(
            gate.field, f"is decided at {gate.site}, after {first}, where {sae.name!r} edits; it must read that site "
            "or an earlier one"
        )  # fmt: skip


def _check_disjoint(placed: Sequence[ResolvedEdit], prepared: Sequence[PreparedEdit]) -> None:
    """Two edits of one feature on one token would each measure from the original value."""
    known: dict[tuple[str, int], list[int]] = {}
    for index, one in enumerate(placed):
        if one.is_shadow:
            continue
        for other in known.setdefault((one.sae, one.feature), []):
            before = placed[other]
            if one.first < before.last and before.first < one.last:
                where = f"feature {one.feature} of {one.sae!r}"
                raise InvalidRequest(
                    f"{prepared[index].field}.feature", f"{where} is already edited by {prepared[other].field}"
                )
        known[one.sae, one.feature].append(index)


def _affine(one: Intervention, sae: LoadedSae, field: str) -> Affine:
    kind = one.edit.kind
    unit: Unit = getattr(one.edit, "unit", "raw")
    affine = one.edit.affine(raw_per_unit(sae, one.target.feature, unit, field, f"{field}.{kind}.unit"))
    given = [value for value in (affine.beta, affine.lo, affine.hi) if isfinite(value)]
    if any(abs(value) > FLOAT32_MAX for value in given):
        raise InvalidRequest(f"{field}.{kind}.value", "is not finite in float32 once it is in raw units")
    return affine


def _part(edit: ResolvedEdit, scope: Scope, sae: LoadedSae, gate: PreparedGuard | None) -> str:
    return digest(
        {
            "sae": sae.digest,
            "sites": [str(site) for site in (sae.site, *sae.writes)],
            "feature": edit.feature,
            "affine": [repr(value) for value in edit.affine],
            "scope": [scope.phase, scope.start, scope.end, scope.include_special_tokens],
            "how": [edit.is_shadow, edit.is_limited],
            "when": None if gate is None else gate.part,
        }
    )
