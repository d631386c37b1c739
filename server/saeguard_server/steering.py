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
from typing import Protocol

from saeguard.types import Apply, Condition, FeatureRef, Intervention, Scope, Stop, Trigger, Unit
from saeguard_sae.edit_table import FOREVER
from saeguard_sae.edits import FLOAT32_MAX, Affine
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Site, depth
from saeguard_server.catalog import check_editable, check_watchable, find_feature, find_sae, raw_per_unit
from saeguard_server.engine.protocol import OWN, Engine, Origin, Probe, ResolvedEdit, ResolvedGuard, Steering
from saeguard_server.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An intervention that shall be made on one request, and who wants it."""

    intervention: Intervention
    field: str
    """How refusals name it, such as ``interventions[2]``."""
    affine: Affine | None = None
    """What is done instead of the intervention's edit, in raw units: an edit tightened by another."""
    origin: Origin = OWN
    is_shadow: bool = False
    """Counted as if it were made, and not made."""
    is_limited: bool = True
    """Whether the request's ``max_relative_edit`` may shorten it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedTrigger:
    """A trigger that shall watch one request; ``is_shadow`` and ``is_limited`` are its edits' too."""

    trigger: Trigger
    field: str
    """How refusals name it, such as ``triggers[2]``."""
    origin: Origin = OWN
    is_shadow: bool = False
    is_limited: bool = True


# Which tokens a model will read for one request, and whether a scope holds any of them.


@dataclass(frozen=True, slots=True)
class TokenRange:
    """The prompt, and how many ``tokens`` the model reads at most, prompt included."""

    prompt: tuple[int, ...]
    tokens: int
    special_ids: frozenset[int]

    def place(self, scope: Scope) -> tuple[int, int]:
        """``[first, last)`` position that the scope selects."""
        first, last = scope.positions(len(self.prompt))
        return first, FOREVER if last is None else last

    def check(self, scope: Scope, field: str) -> None:
        """Refuses a scope that holds no token the model will read: what it limits would silently never be done.

        Raises:
            InvalidRequest: it holds none.
        """
        first, last = self.place(scope)
        end = min(last, self.tokens)
        is_only_special = (
            not scope.include_special_tokens
            and end <= len(self.prompt)
            and all(token in self.special_ids for token in self.prompt[first:end])
        )
        if first >= end or is_only_special:
            read = f"positions 0 to {self.tokens - 1}, {len(self.prompt)} of them prompt"
            raise InvalidRequest(field, f"selects no token: the model reads {read}")


# From the conditions that callers write to the guards that an engine decides, in raw units and at a known site.


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCondition:
    """A guard of which all is known but the request's positions."""

    guard: ResolvedGuard
    scope: Scope
    site: Site
    """Where it is decided: the deepest that it reads."""
    field: str
    part: str
    """Hash of what it is, for the steering's digest."""

    def check(self, reach: TokenRange) -> None:
        """Refuses a request's own condition on no token that the model will read.

        Raises:
            InvalidRequest: it is.
        """
        if not self.guard.origin.policy:
            reach.check(self.scope, f"{self.field}.scope")

    def placed(self, reach: TokenRange) -> ResolvedGuard:
        """The guard on one request's tokens."""
        if self.scope.phase == "all":
            return self.guard
        first, last = reach.place(self.scope)
        return replace(self.guard, first=first, last=last)


def prepare_condition(
    engine: Engine,
    when: Condition,
    field: str,
    origin: Origin,
    *,
    latches: bool = False,
    stops: bool = False,
    is_trigger: bool = False,
    is_shadow: bool = False,
) -> PreparedCondition:
    """A condition as the engine decides it; ``field`` is how refusals name it.

    Raises:
        UnknownName, InvalidRequest: the field that cannot be decided as it stands.
    """
    if not engine.capabilities.conditions:
        raise InvalidRequest(field, f"the {engine.capabilities.engine} engine decides no conditions")
    read = [_read(engine, when, index, field) for index in range(len(when.terms))]
    threshold, release = _in_raw_units(when, read[0], field)
    guard = ResolvedGuard(
        probe=Probe(tuple((one.sae, one.feature, one.weight) for one in when.terms), when.bias),
        comparison=when.comparison,
        threshold=threshold,
        release=release,
        window=when.window,
        first=when.scope.start,
        last=FOREVER if when.scope.end is None else when.scope.end,
        special=when.scope.include_special_tokens,
        latches=latches,
        stops=stops,
        is_trigger=is_trigger,
        is_shadow=is_shadow,
        origin=origin,
    )
    deepest = max((sae.write_sites[0] for sae in read), key=depth)
    return PreparedCondition(guard, when.scope, deepest, field, _condition_part(guard, when.scope, read))


def steering_digest(parts: object) -> str:
    """SHA-256 of anything that JSON can hold, hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(engine: Engine, when: Condition, index: int, field: str) -> LoadedSae:
    ref, where = when.terms[index].ref, f"{field}.terms[{index}]"
    sae = find_feature(engine, ref, where)
    check_watchable(sae, f"{where}.sae")
    check_editable(engine, sae, f"{where}.sae")
    return sae


def _in_raw_units(when: Condition, sae: LoadedSae, field: str) -> tuple[float, float]:
    """Threshold and release."""
    unit = raw_per_unit(sae, when.terms[0].feature, when.unit, f"{field}.terms[0]", f"{field}.unit")
    threshold = when.threshold * unit
    release = threshold if when.release is None else when.release * unit
    for name, value in (("threshold", threshold), ("release", release)):
        if not isfinite(value) or abs(value) > FLOAT32_MAX:
            raise InvalidRequest(f"{field}.{name}", "is not finite in float32 once it is in raw units")
    return threshold, release


def _condition_part(guard: ResolvedGuard, scope: Scope, read: list[LoadedSae]) -> str:
    terms = zip(guard.probe.terms, read, strict=True)
    return steering_digest(
        {
            "terms": sorted([sae.digest, str(sae.site), feature, repr(weight)] for (_, feature, weight), sae in terms),
            "bias": repr(guard.probe.bias),
            "decides": [guard.comparison, repr(guard.threshold), repr(guard.release)],
            "window": [guard.window.kind, guard.window.tokens, guard.window.k],
            "scope": [scope.phase, scope.start, scope.end, scope.include_special_tokens],
            "does": [guard.latches, guard.stops, guard.is_trigger, guard.is_shadow],
        }
    )


@dataclass(frozen=True, slots=True, eq=False)
class PreparedEdit:
    """An edit of which all is known but the request's positions."""

    edit: ResolvedEdit
    """In raw units; at the positions of a scope without a phase, and without its gate's number."""
    scope: Scope
    gate: PreparedCondition | None
    field: str
    part: str
    """Hash of what it is, for the steering's digest."""

    @property
    def affine(self) -> Affine:
        """What is done to the feature, in raw units."""
        return self.edit.affine

    def placed(self, reach: TokenRange, gate: int | None) -> ResolvedEdit:
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

    guard: PreparedCondition
    edits: tuple[PreparedEdit, ...]


def prepare_edit(engine: Engine, wanted: Wanted) -> PreparedEdit:
    """An intervention as the engine can make it.

    Raises:
        UnknownName, InvalidRequest: the field that cannot be applied as it stands.
    """
    when, gate = wanted.intervention.when, None
    if when is not None:
        gate = prepare_condition(engine, when, f"{wanted.field}.when", Origin(wanted.origin.policy))
    return _prepare(engine, wanted, gate)


def prepare_trigger(engine: Engine, wanted: WantedTrigger) -> PreparedTrigger:
    """A trigger as the engine can decide it, with its edits.

    Raises:
        UnknownName, InvalidRequest: the field that cannot be decided or applied as it stands.
    """
    one, action = wanted.trigger, wanted.trigger.action
    guard = prepare_condition(
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
    edits: Sequence[PreparedEdit],
    triggers: Sequence[PreparedTrigger],
    max_relative_edit: float | None,
    reach: TokenRange,
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


def resolve_steering(
    engine: Engine,
    interventions: Sequence[Intervention],
    max_relative_edit: float | None,
    reach: TokenRange,
    triggers: Sequence[Trigger] = (),
) -> Steering:
    """The steering of a request on which no policy acts.

    Raises:
        UnknownName, InvalidRequest: the field that cannot be applied as it stands.
    """
    return steer(
        [prepare_edit(engine, one) for one in own_edits(interventions)],
        [prepare_trigger(engine, one) for one in own_triggers(triggers)],
        max_relative_edit,
        reach,
    )


def own_edits(interventions: Iterable[Intervention]) -> tuple[Wanted, ...]:
    """A request's own."""
    return tuple(Wanted(intervention=one, field=f"interventions[{index}]") for index, one in enumerate(interventions))


def own_triggers(triggers: Iterable[Trigger]) -> tuple[WantedTrigger, ...]:
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

    def __init__(self, reach: TokenRange) -> None:
        self.placed: list[ResolvedGuard] = []
        self._reach = reach
        self._known: dict[object, int] = {}

    def add(self, guard: PreparedCondition, key: object) -> int:
        self._known[key] = len(self.placed)
        self.placed.append(guard.placed(self._reach))
        return self._known[key]

    def find(self, guard: PreparedCondition) -> int:
        guard.check(self._reach)
        key = guard if guard in self._known else guard.part
        return self._known[key] if key in self._known else self.add(guard, key)


def _prepare(engine: Engine, wanted: Wanted, gate: PreparedCondition | None) -> PreparedEdit:
    one, field = wanted.intervention, wanted.field
    sae, kind = find_feature(engine, one.ref, field), one.kind
    if kind not in engine.capabilities.kinds:
        raise InvalidRequest(f"{field}.{kind}", f"the {engine.capabilities.engine} engine cannot apply it")
    check_editable(engine, sae, f"{field}.sae")
    if gate is not None:
        _check_order(sae, gate, field)
    affine = _affine(one, sae, field) if wanted.affine is None else wanted.affine
    last = FOREVER if one.scope.end is None else one.scope.end
    edit = ResolvedEdit(
        one.sae, one.feature, kind, affine, one.scope.start, last, one.scope.include_special_tokens,
        is_shadow=wanted.is_shadow, is_limited=wanted.is_limited, origin=wanted.origin,
    )  # fmt: skip
    return PreparedEdit(edit, one.scope, gate, field, _edit_part(edit, one.scope, sae, gate))


def _check_order(sae: LoadedSae, gate: PreparedCondition, field: str) -> None:
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
    kind = one.kind
    unit: Unit = getattr(one, "unit", "raw")
    affine = Affine(*one.affine(raw_per_unit(sae, one.feature, unit, field, f"{field}.{kind}.unit")))
    given = [value for value in (affine.beta, affine.lo, affine.hi) if isfinite(value)]
    if any(abs(value) > FLOAT32_MAX for value in given):
        raise InvalidRequest(f"{field}.{kind}.value", "is not finite in float32 once it is in raw units")
    return affine


def _edit_part(edit: ResolvedEdit, scope: Scope, sae: LoadedSae, gate: PreparedCondition | None) -> str:
    return steering_digest(
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


# What policies are checked against and prepared for, as the flows know it; here, so that the guard needs no engine.


class EditPart(Protocol):
    """An edit ready to be made; all that is open are a request's positions."""

    @property
    def affine(self) -> Affine:
        """What is done to the feature, in raw units."""
        ...


class TriggerPart(Protocol):
    """A trigger ready to be decided."""

    @property
    def edits(self) -> Sequence[EditPart]:
        """What it applies, in the order of its interventions."""
        ...


class Served(Protocol):
    """One model with its SAEs and its engine."""

    @property
    def model_name(self) -> str: ...

    @property
    def model_digest(self) -> str: ...

    @property
    def max_context(self) -> int:
        """Tokens that one request may hold."""
        ...

    @property
    def keeps_audit(self) -> bool:
        """Whether there is an audit for ``requires_audit``."""
        ...

    @property
    def compares(self) -> bool:
        """Whether requests can also be run without a policy, for ``counterfactual_share``."""
        ...

    def sae(self, name: str, field: str) -> LoadedSae:
        """The SAE of that name.

        Raises:
            UnknownName: there is none.
        """
        ...

    def feature(self, ref: FeatureRef, field: str) -> LoadedSae:
        """The SAE of a feature that it has.

        Raises:
            UnknownName, InvalidRequest: there is none.
        """
        ...

    def edit(self, wanted: Wanted) -> EditPart:
        """An edit as the engine can make it.

        Raises:
            UnknownName, InvalidRequest: the field that cannot be applied as it stands.
        """
        ...

    def trigger(self, wanted: WantedTrigger) -> TriggerPart:
        """A trigger as the engine can decide it.

        Raises:
            UnknownName, InvalidRequest: the field that cannot be decided or applied as it stands.
        """
        ...


# What is served, as policies see it, and their part of a request as the engine takes it.


class ServedModel:
    """A ``guard.policy.served.Served``: one engine's model and SAEs."""

    def __init__(self, engine: Engine, *, keeps_audit: bool = False) -> None:
        self._engine, self._keeps_audit = engine, keeps_audit

    @property
    def keeps_audit(self) -> bool:
        """Whether requests can be recorded."""
        return self._keeps_audit

    @property
    def compares(self) -> bool:
        """Whether it can be measured what a policy changes."""
        return self._engine.capabilities.compares

    @property
    def model_name(self) -> str:
        """What policies aim at."""
        return self._engine.model.name

    @property
    def model_digest(self) -> str:
        """What policies pin."""
        return self._engine.model.digest

    @property
    def max_context(self) -> int:
        """What positions in policies are compared with."""
        return self._engine.model.max_context

    def sae(self, name: str, field: str) -> LoadedSae:
        """The SAE of that name; raises UnknownName."""
        return find_sae(self._engine, name, field)

    def feature(self, ref: FeatureRef, field: str) -> LoadedSae:
        """The SAE of a feature that it has; raises UnknownName, InvalidRequest."""
        return find_feature(self._engine, ref, field)

    def edit(self, wanted: Wanted) -> PreparedEdit:
        """An edit as the engine can make it; raises UnknownName, InvalidRequest."""
        return prepare_edit(self._engine, wanted)

    def trigger(self, wanted: WantedTrigger) -> PreparedTrigger:
        """A trigger as the engine can decide it; raises UnknownName, InvalidRequest."""
        return prepare_trigger(self._engine, wanted)


def prepared_parts(
    edits: Sequence[EditPart], triggers: Sequence[TriggerPart]
) -> tuple[list[PreparedEdit], list[PreparedTrigger]]:
    """What a resolution holds, as ``ServedModel`` made it."""
    return [_edit(one) for one in edits], [_trigger(one) for one in triggers]


def _edit(part: EditPart) -> PreparedEdit:
    assert isinstance(part, PreparedEdit), "made by ServedModel.edit"
    return part


def _trigger(part: TriggerPart) -> PreparedTrigger:
    assert isinstance(part, PreparedTrigger), "made by ServedModel.trigger"
    return part
