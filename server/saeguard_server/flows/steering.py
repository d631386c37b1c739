"""From the interventions a caller names to the edits that are applied: names found, positions reachable."""

from __future__ import annotations

import hashlib
import json
from math import isfinite

from saeguard_sae.coder import why_not_editable
from saeguard_sae.edits import FLOAT32_MAX, Affine, Edit
from saeguard_sae.loading import LoadedSae
from saeguard_sae.table import FOREVER
from saeguard_server.engine.protocol import Engine, ResolvedEdit, Steering
from saeguard_server.errors import InvalidRequest, UnknownName
from saeguard_server.interventions import FeatureRef, Intervention, Scope


def find_sae(engine: Engine, name: str, field: str) -> LoadedSae:
    """The served SAE of that name.

    Raises:
        UnknownName: there is none; names those there are.
    """
    if name not in engine.saes:
        served = ", ".join(sorted(engine.saes)) or "none"
        raise UnknownName(field, f"no SAE {name!r} is served; there are: {served}")
    return engine.saes[name]


def find_feature(engine: Engine, ref: FeatureRef, field: str) -> LoadedSae:
    """The SAE of a feature that it has.

    Raises:
        UnknownName: no such SAE.
        InvalidRequest: the feature is outside it.
    """
    sae = find_sae(engine, ref.sae, f"{field}.sae")
    if ref.feature >= sae.dictionary.d_sae:
        raise InvalidRequest(f"{field}.feature", f"must be 0 to {sae.dictionary.d_sae - 1}, got {ref.feature}")
    return sae


def resolve(
    engine: Engine,
    interventions: tuple[Intervention, ...],
    max_relative_edit: float | None,
    prompt: tuple[int, ...],
    read_tokens: int,
    special_ids: frozenset[int],
) -> Steering:
    """The edits as the engine applies them, with their digest.

    Args:
        read_tokens: positions the model will read at most, prompt included.

    Raises:
        UnknownName, InvalidRequest: the field that cannot be applied as it stands.
    """
    if not interventions:
        if max_relative_edit is not None:
            raise InvalidRequest("max_relative_edit", "has nothing to limit: there are no interventions")
        return Steering()
    edits = tuple(
        _resolve_one(engine, one, f"interventions[{index}]", prompt, read_tokens, special_ids)
        for index, one in enumerate(interventions)
    )
    limit = float("inf") if max_relative_edit is None else max_relative_edit
    return Steering(edits, limit, _digest(engine, interventions, edits, max_relative_edit))


def _resolve_one(
    engine: Engine,
    one: Intervention,
    field: str,
    prompt: tuple[int, ...],
    read_tokens: int,
    special_ids: frozenset[int],
) -> ResolvedEdit:
    sae = find_feature(engine, one.target, field)
    kind = one.edit.kind
    if kind not in engine.capabilities.kinds:
        raise InvalidRequest(f"{field}.{kind}", f"the {engine.capabilities.engine} engine cannot apply it")
    _check_editable(engine, sae, f"{field}.sae")
    affine = _affine(one.edit, sae, one.target.feature, field)
    first, last = one.scope.positions(len(prompt))
    _check_reach(one.scope, first, last, prompt, read_tokens, special_ids, f"{field}.scope")
    end = FOREVER if last is None else last
    return ResolvedEdit(one.target.sae, one.target.feature, kind, affine, first, end, one.scope.include_special_tokens)


def _check_editable(engine: Engine, sae: LoadedSae, field: str) -> None:
    if reason := why_not_editable(sae.dictionary):
        raise InvalidRequest(field, f"{sae.name!r} is a {sae.dictionary.architecture} SAE: {reason}")
    for site in (sae.site, *sae.writes):
        if site not in engine.capabilities.sites:
            raise InvalidRequest(field, f"the {engine.capabilities.engine} engine cannot edit at {site}")


def check_watchable(sae: LoadedSae, field: str) -> None:
    """Refuses to read features along with a generation that depend on more than the token at hand.

    Raises:
        InvalidRequest: this SAE has such features.
    """
    if why_not_editable(sae.dictionary):
        raise InvalidRequest(
            field, f"{sae.name!r} is a {sae.dictionary.architecture} SAE: its features need the whole prefix; "
            "GetActivations reads them"
        )  # fmt: skip


def _affine(edit: Edit, sae: LoadedSae, feature: int, field: str) -> Affine:
    affine = edit.affine(_unit_scale(edit, sae, feature, field))
    given = [value for value in (affine.beta, affine.lo, affine.hi) if isfinite(value)]
    if any(abs(value) > FLOAT32_MAX for value in given):
        raise InvalidRequest(f"{field}.{edit.kind}.value", "is not finite in float32 once it is in raw units")
    return affine


def _unit_scale(edit: Edit, sae: LoadedSae, feature: int, field: str) -> float:
    """Raw feature values in one of the edit's units."""
    unit = getattr(edit, "unit", "raw")
    if unit == "raw":
        return 1.0
    if unit == "unit_decoder":
        norm = sae.decoder_norm(feature)
        if norm == 0:
            raise InvalidRequest(f"{field}.feature", "its decoder row is zero: it writes nothing")
        return 1.0 / norm
    maximum = sae.catalogue.feature(feature).maximum
    if maximum is None:
        raise InvalidRequest(
            f"{field}.{edit.kind}.unit", f"the catalogue of {sae.name!r} has no maximum of this feature"
        )
    return maximum


def _check_reach(
    scope: Scope,
    first: int,
    last: int | None,
    prompt: tuple[int, ...],
    read_tokens: int,
    special_ids: frozenset[int],
    field: str,
) -> None:
    """Refuses a scope that holds no token the model will read: it would leave the request silently unsteered."""
    end = read_tokens if last is None else min(last, read_tokens)
    is_only_special = (
        not scope.include_special_tokens
        and end <= len(prompt)
        and all(token in special_ids for token in prompt[first:end])
    )
    if first >= end or is_only_special:
        raise InvalidRequest(
            field, f"selects no token: the model reads positions 0 to {read_tokens - 1}, {len(prompt)} of them prompt"
        )


def _digest(
    engine: Engine, interventions: tuple[Intervention, ...], edits: tuple[ResolvedEdit, ...], limit: float | None
) -> str:
    """SHA-256 of what is applied, hex; the order of the interventions does not matter."""
    parts = [
        {
            "sae": engine.saes[edit.sae].digest,
            "sites": [str(site) for site in (engine.saes[edit.sae].site, *engine.saes[edit.sae].writes)],
            "feature": edit.feature,
            "affine": [repr(value) for value in edit.affine],
            "scope": [one.scope.phase, one.scope.start, one.scope.end, one.scope.include_special_tokens],
        }
        for one, edit in zip(interventions, edits, strict=True)
    ]
    ordered = sorted(json.dumps(part, sort_keys=True) for part in parts)
    return hashlib.sha256(json.dumps([ordered, limit]).encode()).hexdigest()
