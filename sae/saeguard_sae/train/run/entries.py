"""``[[saes]]``: the SAEs of a run. A list in place of a value is a sweep, each of its values an SAE."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, get_origin, get_type_hints

import msgspec

from saeguard_sae.site import Site
from saeguard_sae.train.run.errors import BadConfig
from saeguard_sae.train.run.keys import converted, names_of, refuse_unknown, table
from saeguard_sae.train.settings import SaeSettings

_OF_THE_RUN = {"steps", "batch", "is_transcoder"}
"""Set by the run, the stream and write_site."""
_NEEDS_ORDER = {"smooth_weight"}
"""Asks for the token before each, which a mixing buffer has lost."""
_HINTS: dict[str, Any] = {
    name: hint
    for name, hint in get_type_hints(SaeSettings).items()
    if name in names_of(SaeSettings) and name not in _OF_THE_RUN | _NEEDS_ORDER
}
_KEYS = ("name", "site", "write_site", "expansion", *_HINTS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_PLACEHOLDER_STEPS = 1


class SaeEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One SAE of a run.

    Raises:
        ValueError: names the key.
    """

    name: str
    """Its folder."""
    site: str
    """Where it reads, such as "resid_post.12"."""
    write_site: str | None = None
    """Where a transcoder writes, such as "mlp_out.12"."""
    expansion: int = 16
    """Features per dimension of what it reads, where settings name no d_sae."""
    settings: dict[str, Any] = {}
    """Fields of SaeSettings; k and its like."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '.', '_' and '-', got {self.name!r}")
        if self.expansion < 1:
            raise ValueError(f"expansion must be positive, got {self.expansion}")
        for site in filter(None, (self.site, self.write_site)):
            Site.parse(site)
        if self.write_site == self.site:
            raise ValueError(f"write_site is {self.site}, where it reads: leave it out for an SAE")
        if "d_sae" in self.settings:
            self.complete(self.settings["d_sae"], _PLACEHOLDER_STEPS, 1)

    @property
    def reads(self) -> Site:
        """Where it reads."""
        return Site.parse(self.site)

    @property
    def writes(self) -> Site | None:
        """Where a transcoder writes; None for an SAE."""
        return Site.parse(self.write_site) if self.write_site else None

    @property
    def sites(self) -> tuple[Site, ...]:
        """All that it needs activations of."""
        return (self.reads,) if self.writes is None else (self.reads, self.writes)

    def complete(self, d_sae: int, steps: int, batch: int) -> SaeSettings:
        """What the learner is made from.

        Raises:
            ValueError: names the field and what is allowed.
        """
        fixed: dict[str, Any] = {"d_sae": d_sae, "steps": steps, "batch": batch}
        return SaeSettings(**{**self.settings, **fixed}, is_transcoder=self.write_site is not None)

    def sized(self, d_in: int, steps: int, batch: int) -> SaeSettings:
        """As ``complete``, for what is ``d_in`` wide."""
        d_sae: int = self.settings.get("d_sae", self.expansion * d_in)
        return self.complete(d_sae, steps, batch)


def entries(tables: object, seed: int) -> tuple[SaeEntry, ...]:
    """The tables of the file -> every SAE of the run; ``seed`` is for those that name none.

    Raises:
        BadConfig: names the key.
    """
    if not isinstance(tables, list | tuple):
        raise BadConfig("saes: must be tables, written [[saes]]")
    return tuple(one for index, found in enumerate(tables) for one in _of_table(f"saes[{index}]", found, seed))


def _of_table(where: str, found: object, seed: int) -> Iterator[SaeEntry]:
    keys = dict(table(where, found))
    keys.setdefault("seed", seed)
    for name in sorted(_NEEDS_ORDER & keys.keys()):
        raise BadConfig(f"{where}.{name}: needs each token's predecessor, which a mixed stream does not keep")
    refuse_unknown(where, keys, _KEYS)
    for name in ("name", "site"):
        if name not in keys:
            raise BadConfig(f"{where}.{name}: must be given")
    if "d_sae" in keys and "expansion" in keys:
        raise BadConfig(f"{where}.expansion: d_sae is given too; one of the two")
    swept = {name: _values(where, name, value) for name, value in keys.items() if _is_swept(name, value)}
    if "site" in swept and "write_site" in keys:
        raise BadConfig(f"{where}.site: a transcoder has one place to read; write a [[saes]] for each")
    for chosen in product(*swept.values()):
        yield _entry(where, {**keys, **dict(zip(swept, chosen, strict=True))}, tuple(swept))


def _is_swept(name: str, value: object) -> bool:
    """Whether it is a list where one value is wanted."""
    return isinstance(value, list | tuple) and name not in ("name", "write_site") and not _is_list(name)


def _is_list(name: str) -> bool:
    return get_origin(_HINTS.get(name)) is tuple


def _values(where: str, name: str, value: Any) -> list[Any]:
    values = list(value)
    if not values or any(values.count(one) > 1 for one in values):
        raise BadConfig(f"{where}.{name}: a sweep needs values, each once; got {value!r}")
    return values


def _entry(where: str, keys: Mapping[str, Any], swept: tuple[str, ...]) -> SaeEntry:
    settings = {
        name: converted(f"{where}.{name}", value, _HINTS[name]) for name, value in keys.items() if name in _HINTS
    }
    own: dict[str, Any] = {name: value for name, value in keys.items() if name not in _HINTS}
    if swept:
        own["name"] = "-".join([str(own["name"]), *(_suffix(name, keys[name]) for name in swept)])
    entry: SaeEntry = converted(where, {**own, "settings": settings}, SaeEntry)
    return entry


def _suffix(name: str, value: object) -> str:
    return str(value) if isinstance(value, str) else f"{name}{value}"
