"""From a path to an SAE that can be served: finds the format, checks the weights, reads the catalogue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from saeguard_sae import catalogue
from saeguard_sae.catalogue import Catalogue, Quality
from saeguard_sae.coder import SparseCoder
from saeguard_sae.formats import FORMATS, Format
from saeguard_sae.formats.files import checkpoint
from saeguard_sae.formats.found import Choices, Convention, Found, Origin, Source
from saeguard_sae.site import Site

_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")


class LoadError(ValueError):
    """An SAE that cannot be loaded; the message names the file and what would help."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenedSae:
    """An SAE read from disk, not yet tied to a model (``binding.bind``). ``digest`` as ``LoadedSae`` has it."""

    name: str
    format: str
    found: Found
    digest: str
    catalogue: Catalogue


@dataclass(frozen=True, slots=True, eq=False)
class LoadedSae:
    """An SAE with its place in the model.

    ``digest``: SHA-256 of its weight and config files, hex; where settings decide what they mean, of those too.
    """

    name: str
    site: Site
    """Where it reads."""
    dictionary: SparseCoder
    digest: str
    catalogue: Catalogue
    writes: tuple[Site, ...] = ()
    """Where it writes; empty where that is ``site``. Several for one layer of a cross-layer transcoder."""
    write_gain: Tensor | None = None
    """[write_width] multiplies what is written, where the model's own norm gain stands between reading and writing."""
    format: str = ""
    conventions: tuple[Convention, ...] = ()
    stated_l0: float | None = None
    measured: Quality | None = None
    """On the model it is served with."""

    @property
    def write_sites(self) -> tuple[Site, ...]:
        """Where its edits change the model."""
        return self.writes or (self.site,)

    @property
    def write_width(self) -> int:
        """Width of what it writes at each of them."""
        return self.dictionary.d_out // len(self.write_sites)

    def decoder_norm(self, feature: int) -> float:
        """The length of what one unit of the feature writes."""
        return float(self.dictionary.W_dec[feature].float().norm())


def open_sae(
    name: str, path: Path, *, origin: Origin | None = None, choices: Choices | None = None, facts: Choices | None = None
) -> OpenedSae:
    """The SAE in ``path``, in float32, before it is tied to a model.

    Args:
        name: what callers will call it.
        path: a folder or file in one of the known formats.
        origin: where it was published, which decides what some formats leave open.
        choices: what the user says; one that makes no difference is refused.
        facts: what a catalogue of releases says, where the files and the user do not.

    Raises:
        LoadError: unknown format, a convention not supported, or bad weights.
    """
    try:
        kind, found = read(Source(path, origin, choices or Choices()), facts)
        entries = catalogue.read(path if path.is_dir() else path.parent, found.dictionary.d_sae)
        decided = {one: value for one, value in _merged(choices, facts).given().items() if one in found.used}
        return OpenedSae(name, kind, found, with_settings(digest(found.files), decided), entries)
    except (ValueError, OSError) as err:
        raise LoadError(f"SAE {name!r} in {path}: {err}") from err


def load(name: str, path: Path, site: Site | None = None) -> LoadedSae:
    """The SAE in ``path`` as its files describe it, with no model to check it against.

    Args:
        name: what callers will call it.
        path: a folder or file in one of the known formats.
        site: overrides what the files say.

    Raises:
        LoadError: unknown format, a convention not supported, bad weights, or no site known.
    """
    opened = open_sae(name, path)
    found = opened.found
    where = site if site is not None else found.reads
    writes = tuple(one for one in found.writes if isinstance(one, Site))
    if not isinstance(where, Site) or len(writes) < len(found.writes):
        raise LoadError(f"SAE {name!r} in {path}: its files do not say where in the model it belongs; give the site")
    return LoadedSae(
        name,
        where,
        found.dictionary,
        opened.digest,
        opened.catalogue,
        writes,
        format=opened.format,
        conventions=found.conventions,
        stated_l0=found.stated_l0,
    )


def digest(files: tuple[Path, ...]) -> str:
    """SHA-256 over the files' names and bytes in the order of their names, hex."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda one: one.name):
        with file.open("rb") as stream:
            part = hashlib.file_digest(stream, "sha256").digest()
        total.update(file.name.encode() + b"\0" + part)
    return total.hexdigest()


def with_settings(files: str, settings: Mapping[str, object]) -> str:
    """The digest of files as settings make them mean something else; the files' own where there are none."""
    if not settings:
        return files
    return hashlib.sha256(json.dumps([files, sorted(settings.items())], default=str).encode()).hexdigest()


def read(source: Source, facts: Choices | None = None) -> tuple[str, Found]:
    """The name of the format and what it holds.

    Args:
        facts: its scale stands in where the user gives none; it does not matter if it makes no difference.

    Raises:
        ValueError: no known format, something in it that is not understood, or a choice that it cannot use.
    """
    path, known = _find(source.path)
    given = {name for name, value in source.choices.given().items() if value is not None}
    found = known.load(replace(source, path=path, choices=_merged(source.choices, facts)))
    if unused := sorted(given - found.used):
        raise ValueError(f"{unused[0]}: the {known.NAME} format, or this SAE in it, leaves no such choice")
    return known.NAME, found


def _merged(choices: Choices | None, facts: Choices | None) -> Choices:
    said = choices or Choices()
    if said.scale is not None or facts is None:
        return said
    return replace(said, scale=facts.scale, scale_said_by=facts.scale_said_by)


def recognised(path: Path) -> str | None:
    """The name of the format of a folder or file; None for what is no SAE."""
    return next((known.NAME for known in FORMATS if known.recognises(path)), None)


def _find(path: Path) -> tuple[Path, Format]:
    """The format, and the file or folder that holds it."""
    if not path.exists():
        raise FileNotFoundError("no such file or folder")
    for known in FORMATS:
        if known.recognises(path):
            return path, known
    inside = sorted(one for one in path.iterdir() if one.suffix in _WEIGHTS) if path.is_dir() else []
    if len(inside) == 1:
        return _find(inside[0])
    if path.suffix in (".pt", ".pth"):
        checkpoint(path)  # says why no format could look into it, where that is so
    if path.name.endswith((".pkl", ".pkl.gz")):
        raise ValueError("a pickle, which could run any code, is not read; save its state dict alone with torch.save")
    names = f"; name one of its files: {', '.join(one.name for one in inside[:8])}" if inside else ""
    raise ValueError(f"not a known SAE format{names}; known are {', '.join(one.NAME for one in FORMATS)}")
