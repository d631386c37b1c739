"""What callers name, found among what is served, or refused by field."""

from __future__ import annotations

from saeguard_sae.coders import why_not_editable
from saeguard_sae.edits import Unit
from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.protocol import Engine
from saeguard_server.errors import InvalidRequest, UnknownName
from saeguard_server.interventions import FeatureRef


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


def check_editable(engine: Engine, sae: LoadedSae, field: str) -> None:
    """Refuses to edit features of an SAE where that cannot be done.

    Raises:
        InvalidRequest: it cannot be exact, or the engine does not reach its sites.
    """
    if reason := why_not_editable(sae.dictionary):
        raise InvalidRequest(field, f"{sae.name!r} is a {sae.dictionary.architecture} SAE: {reason}")
    for site in (sae.site, *sae.writes):
        if site not in engine.capabilities.sites:
            raise InvalidRequest(field, f"the {engine.capabilities.engine} engine cannot edit at {site}")


def raw_per_unit(sae: LoadedSae, feature: int, unit: Unit, field: str, unit_field: str) -> float:
    """Raw feature values in one of the unit.

    Raises:
        InvalidRequest: the feature lacks what the unit needs.
    """
    if unit == "raw":
        return 1.0
    if unit == "unit_decoder":
        norm = sae.decoder_norm(feature)
        if norm == 0:
            raise InvalidRequest(f"{field}.feature", "its decoder row is zero: it writes nothing")
        return 1.0 / norm
    maximum = sae.catalogue.feature(feature).maximum
    if maximum is None:
        raise InvalidRequest(unit_field, f"the catalogue of {sae.name!r} has no maximum of this feature")
    return maximum
