"""From the conditions that callers write to the guards that an engine decides, in raw units and at a known site."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

from saeguard_sae.edit_table import FOREVER
from saeguard_sae.edits import FLOAT32_MAX
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Site, depth
from saeguard_server.engine.protocol import Engine, Probe, ResolvedGuard
from saeguard_server.errors import InvalidRequest
from saeguard_server.flows.reach import Reach
from saeguard_server.flows.served import check_editable, check_watchable, find_feature, raw_per_unit
from saeguard_server.interventions import Condition, Intervention, Origin, Scope, Trigger


@dataclass(frozen=True, slots=True, eq=False)
class PreparedGuard:
    """A guard of which all is known but the request's positions."""

    guard: ResolvedGuard
    scope: Scope
    site: Site
    """Where it is decided: the deepest that it reads."""
    field: str
    part: str
    """Hash of what it is, for the steering's digest."""

    def check(self, reach: Reach) -> None:
        """Refuses a request's own condition on no token that the model will read.

        Raises:
            InvalidRequest: it is.
        """
        if not self.guard.origin.policy:
            reach.check(self.scope, f"{self.field}.scope")

    def placed(self, reach: Reach) -> ResolvedGuard:
        """The guard on one request's tokens."""
        if self.scope.phase == "all":
            return self.guard
        first, last = reach.place(self.scope)
        return replace(self.guard, first=first, last=last)


def prepare_guard(
    engine: Engine,
    when: Condition,
    field: str,
    origin: Origin,
    *,
    latches: bool = False,
    stops: bool = False,
    is_trigger: bool = False,
    is_shadow: bool = False,
) -> PreparedGuard:
    """A condition as the engine decides it; ``field`` is how refusals name it.

    Raises:
        UnknownName, InvalidRequest: the field that cannot be decided as it stands.
    """
    if not engine.capabilities.conditions:
        raise InvalidRequest(field, f"the {engine.capabilities.engine} engine decides no conditions")
    read = [_read(engine, when, index, field) for index in range(len(when.terms))]
    threshold, release = _in_raw_units(when, read[0], field)
    guard = ResolvedGuard(
        probe=Probe(tuple((one.feature.sae, one.feature.feature, one.weight) for one in when.terms), when.bias),
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
    return PreparedGuard(guard, when.scope, deepest, field, _part(guard, when.scope, read))


def check_terms(interventions: Sequence[Intervention], triggers: Sequence[Trigger], most: int) -> None:
    """Refuses a request's own conditions where they read too much together: all who run beside it would wait.

    Raises:
        InvalidRequest: more than ``most`` terms.
    """
    conditions = [one.when for one in interventions if one.when is not None] + [one.when for one in triggers]
    if (given := sum(len(one.terms) for one in conditions)) > most:
        field = "triggers" if triggers else "interventions"
        raise InvalidRequest(field, f"all conditions together may have {most} terms, got {given}")


def digest(parts: object) -> str:
    """SHA-256 of anything that JSON can hold, hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(engine: Engine, when: Condition, index: int, field: str) -> LoadedSae:
    ref, where = when.terms[index].feature, f"{field}.terms[{index}]"
    sae = find_feature(engine, ref, where)
    check_watchable(sae, f"{where}.sae")
    check_editable(engine, sae, f"{where}.sae")
    return sae


def _in_raw_units(when: Condition, sae: LoadedSae, field: str) -> tuple[float, float]:
    """Threshold and release."""
    unit = raw_per_unit(sae, when.terms[0].feature.feature, when.unit, f"{field}.terms[0]", f"{field}.unit")
    threshold = when.threshold * unit
    release = threshold if when.release is None else when.release * unit
    for name, value in (("threshold", threshold), ("release", release)):
        if not isfinite(value) or abs(value) > FLOAT32_MAX:
            raise InvalidRequest(f"{field}.{name}", "is not finite in float32 once it is in raw units")
    return threshold, release


def _part(guard: ResolvedGuard, scope: Scope, read: list[LoadedSae]) -> str:
    terms = zip(guard.probe.terms, read, strict=True)
    return digest(
        {
            "terms": sorted([sae.digest, str(sae.site), feature, repr(weight)] for (_, feature, weight), sae in terms),
            "bias": repr(guard.probe.bias),
            "decides": [guard.comparison, repr(guard.threshold), repr(guard.release)],
            "window": [guard.window.kind, guard.window.tokens, guard.window.k],
            "scope": [scope.phase, scope.start, scope.end, scope.include_special_tokens],
            "does": [guard.latches, guard.stops, guard.is_trigger, guard.is_shadow],
        }
    )
