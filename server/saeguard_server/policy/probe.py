"""Linear probes from JSON files: weights on the features of an SAE, and a bias, as they come out of a training script.

.. code-block:: json

    {"sae": "mid", "bias": -1.5, "terms": [{"feature": 12, "weight": 0.8, "label": "flattery"}]}
    {"sae": "mid", "bias": -1.5, "weights": [0.0, 0.8, 0.0]}

``weights`` has one number for each feature, from 0 on; zeros are left out. A term may name another ``sae`` than the
whole. Labels and a ``description`` are for people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeAlias

import msgspec

from saeguard.checks import FieldError
from saeguard.types import MAX_TERMS, Term


class BadProbe(ValueError):
    """A file that is no probe; the message names the field."""


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """``bias + sum of weight * feature``."""

    terms: tuple[Term, ...]
    bias: float


ProbeReader: TypeAlias = Callable[[str], LinearProbe]
"""The probe in a file of that name, for conditions that name one. Raises ValueError."""


def no_probes(name: str) -> LinearProbe:
    """Where there are no files."""
    raise ValueError("files of probes are only read where the policy is read from files")


def probe_in_files(files: Mapping[str, str], yaml_name: str, name: str) -> LinearProbe:
    """From one of the texts that came with the policy's, in its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"must be a file in the policy's folder, got {name!r}")
    place = str(PurePosixPath(yaml_name).parent / path)
    if place not in files:
        raise ValueError(f"there is no file {place!r}")
    return parse_probe(files[place])


class _Term(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    feature: int
    weight: float
    sae: str | None = None
    label: str | None = None


class _Probe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sae: str | None = None
    bias: float = 0.0
    terms: tuple[_Term, ...] | None = None
    weights: tuple[float, ...] | None = None
    labels: dict[str, str] = {}
    """By feature, as text."""
    description: str = ""


def parse_probe(text: str | bytes) -> LinearProbe:
    """The probe that a JSON text describes.

    Raises:
        BadProbe: it describes none.
    """
    try:
        probe = msgspec.json.decode(text, type=_Probe)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise BadProbe(str(err)) from err
    if (probe.terms is None) == (probe.weights is None):
        raise BadProbe("must have one of terms and weights")
    if probe.weights is not None and probe.sae is None:
        raise BadProbe("sae: must be set with weights")
    weights = {f"weights[{i}]": _Term(feature=i, weight=w) for i, w in enumerate(probe.weights or ()) if w}
    listed = weights or {f"terms[{i}]": term for i, term in enumerate(probe.terms or ())}
    if not 1 <= len(listed) <= MAX_TERMS:
        raise BadProbe(f"must have 1 to {MAX_TERMS} weights that are not 0, got {len(listed)}")
    return LinearProbe(tuple(_term(path, term, probe.sae) for path, term in listed.items()), probe.bias)


def _term(path: str, term: _Term, sae: str | None) -> Term:
    name = term.sae or sae
    if name is None:
        raise BadProbe(f"{path}.sae: must be set, here or for the whole probe")
    try:
        return Term(name, term.feature, term.weight)
    except FieldError as err:
        raise BadProbe(str(err.within(path))) from err
