"""The catalogue: what is served, and which features are known by what label. Features nobody knows are not listed."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from saeguard_sae.catalogue import CatalogueFeature
from saeguard_sae.loading import LoadedSae
from saeguard_server.errors import InvalidRequest, UnknownName

DEFAULT_PAGE = 50
LARGEST_PAGE = 1000
PAGE_CHARS = 500_000
"""A page ends early here: a character can take four bytes, and a message may have 4 MiB."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A feature and the SAE it belongs to."""

    sae: str
    entry: CatalogueFeature


@dataclass(frozen=True, slots=True)
class Page:
    """Some features and where to go on; an empty token on the last page."""

    features: tuple[Listed, ...]
    next_page_token: str


class Catalog:
    """Finds features by name, number and words."""

    def __init__(self, saes: Mapping[str, LoadedSae]) -> None:
        self._saes = dict(saes)
        listed = [Listed(name, entry) for name, sae in saes.items() for entry in sae.catalogue.features.values()]
        self._listed = sorted(listed, key=_rank)

    def saes(self) -> tuple[LoadedSae, ...]:
        """Every SAE, by name."""
        return tuple(self._saes[name] for name in sorted(self._saes))

    def feature(self, sae: str, index: int) -> Listed:
        """What is known of one feature.

        Raises:
            UnknownName: no such SAE.
            InvalidRequest: the SAE has no feature of that number.
        """
        loaded = self._sae(sae)
        if not 0 <= index < loaded.dictionary.d_sae:
            raise InvalidRequest("feature", f"{sae!r} has features 0 to {loaded.dictionary.d_sae - 1}, got {index}")
        return Listed(sae, loaded.catalogue.feature(index))

    def features(self, sae: str, query: str, page_size: int, page_token: str) -> Page:
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

    def _search(self, sae: str, query: str) -> Iterator[Listed]:
        words = query.casefold().split()
        for one in self._listed:
            if not sae or one.sae == sae:
                text = _text(one.entry).casefold() if words else ""
                if all(word in text for word in words):
                    yield one


def _rank(one: Listed) -> tuple[bool, float, str, int]:
    return (not one.entry.label, -(one.entry.density or 0.0), one.sae, one.entry.index)


def _text(entry: CatalogueFeature) -> str:
    """Everything a search looks at."""
    tokens = [one.token for one in entry.top_tokens]
    return "\n".join([entry.label or "", *tokens, *(one.text for one in entry.examples)])


def _cut(found: Iterator[Listed], start: int, page_size: int, key: bytes) -> Page:
    features: list[Listed] = []
    chars = 0
    for one in found:
        if len(features) == page_size or chars > PAGE_CHARS:
            return Page(tuple(features), _page_token(start + len(features), key))
        features.append(one)
        chars += len(_text(one.entry))
    return Page(tuple(features), "")


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
