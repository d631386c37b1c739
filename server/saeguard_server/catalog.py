"""The catalogue: what is served, and which features are known by what label. Features nobody knows are not listed."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice

from saeguard_sae.catalogue import CatalogueFeature
from saeguard_sae.coders import why_not_editable
from saeguard_sae.edits import Unit
from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.protocol import Engine
from saeguard_server.errors import InvalidRequest, UnknownName
from saeguard_server.interventions import FeatureRef
from saeguard_server.settings import Settings

DEFAULT_PAGE = 50
LARGEST_PAGE = 1000
PAGE_CHARS = 500_000
"""A page ends early here: a character can take four bytes, and a message may have 4 MiB."""


@dataclass(frozen=True, slots=True)
class ListedFeature:
    """A feature and the SAE it belongs to."""

    sae: str
    entry: CatalogueFeature


@dataclass(frozen=True, slots=True)
class FeaturePage:
    """Some features and where to go on; an empty token on the last page."""

    features: tuple[ListedFeature, ...]
    next_page_token: str


class Catalog:
    """Finds features by name, number and words."""

    def __init__(self, saes: Mapping[str, LoadedSae]) -> None:
        self._saes = dict(saes)
        listed = [ListedFeature(name, entry) for name, sae in saes.items() for entry in sae.catalogue.features.values()]
        self._listed = sorted(listed, key=_rank)

    def saes(self) -> tuple[LoadedSae, ...]:
        """Every SAE, by name."""
        return tuple(self._saes[name] for name in sorted(self._saes))

    def feature(self, sae: str, index: int) -> ListedFeature:
        """What is known of one feature.

        Raises:
            UnknownName: no such SAE.
            InvalidRequest: the SAE has no feature of that number.
        """
        loaded = self._sae(sae)
        if not 0 <= index < loaded.dictionary.d_sae:
            raise InvalidRequest("feature", f"{sae!r} has features 0 to {loaded.dictionary.d_sae - 1}, got {index}")
        return ListedFeature(sae, loaded.catalogue.feature(index))

    def features(self, sae: str, query: str, page_size: int, page_token: str) -> FeaturePage:
        """Features that hold every word of ``query``, of one SAE or ("") of all; labelled ones first, then by density.

        Raises:
            UnknownName: no such SAE.
            InvalidRequest: the page is too large, or the token is not from a page of this search.
        """
        if page_size > LARGEST_PAGE:
            raise InvalidRequest("page_size", f"at most {LARGEST_PAGE}, got {page_size}")
        if sae:
            self._sae(sae)
        start = _position(page_token, sae, query)
        found = islice(self._search(sae, query), start, None)
        return _cut(found, start, page_size or DEFAULT_PAGE, _search_key(sae, query))

    def _sae(self, name: str) -> LoadedSae:
        if name not in self._saes:
            raise UnknownName("sae", f"no SAE is called {name!r}; served are {', '.join(sorted(self._saes)) or 'none'}")
        return self._saes[name]

    def _search(self, sae: str, query: str) -> Iterator[ListedFeature]:
        words = query.casefold().split()
        for one in self._listed:
            if not sae or one.sae == sae:
                text = _text(one.entry).casefold() if words else ""
                if all(word in text for word in words):
                    yield one


def _rank(one: ListedFeature) -> tuple[bool, float, str, int]:
    return (not one.entry.label, -(one.entry.density or 0.0), one.sae, one.entry.index)


def _text(entry: CatalogueFeature) -> str:
    """Everything a search looks at."""
    tokens = [one.token for one in entry.top_tokens]
    return "\n".join([entry.label or "", *tokens, *(one.text for one in entry.examples)])


def _cut(found: Iterator[ListedFeature], start: int, page_size: int, key: bytes) -> FeaturePage:
    features: list[ListedFeature] = []
    chars = 0
    for one in found:
        if len(features) == page_size or chars > PAGE_CHARS:
            return FeaturePage(tuple(features), _page_token(start + len(features), key))
        features.append(one)
        chars += len(_text(one.entry))
    return FeaturePage(tuple(features), "")


def _search_key(sae: str, query: str) -> bytes:
    """Ties a token to its search, so that it cannot silently continue another one."""
    return hashlib.sha256(f"{sae}\0{query}".encode()).digest()[:6]


def _page_token(position: int, key: bytes) -> str:
    return base64.urlsafe_b64encode(key + position.to_bytes(6, "big")).decode()


def _position(page_token: str, sae: str, query: str) -> int:
    if not page_token:
        return 0
    try:
        raw = base64.b64decode(page_token.encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error) as err:
        raise InvalidRequest("page_token", "is not a token that this server gave") from err
    if len(raw) != 12 or raw[:6] != _search_key(sae, query):
        raise InvalidRequest("page_token", "is not from a page of this search")
    return int.from_bytes(raw[6:], "big")


# ServerInfo: what this server is and what it allows, so that a caller need not find out by being refused.


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """The limits that a caller can run into; names as on the wire."""

    max_slots: int
    max_queue: int
    max_context: int
    max_interventions: int
    max_watch: int
    default_max_new_tokens: int
    max_deadline_s: float
    max_activation_inputs: int
    max_triggers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What GetServerInfo says."""

    version: str
    engine: str
    model: str
    limits: ServerLimits
    intervention_kinds: tuple[str, ...]
    conditions: bool
    """Whether the engine decides conditions."""


def describe_server(engine: Engine, settings: Settings) -> ServerInfo:
    """The facts, which do not change while the server runs."""
    limits = settings.limits
    return ServerInfo(
        version=version("saeguard"),
        engine=engine.capabilities.engine,
        model=engine.model.name,
        limits=ServerLimits(
            max_slots=settings.engine.max_slots,
            max_queue=limits.max_queue,
            max_context=engine.model.max_context,
            max_interventions=limits.max_interventions,
            max_watch=limits.max_watch,
            default_max_new_tokens=limits.default_max_new_tokens,
            max_deadline_s=limits.max_deadline_s,
            max_activation_inputs=limits.max_activation_inputs,
            max_triggers=limits.max_triggers,
        ),
        intervention_kinds=tuple(sorted(engine.capabilities.kinds)),
        conditions=engine.capabilities.conditions,
    )


# What callers name, found among what is served, or refused by field.


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
