"""Linear probes from JSON files: weights on the features of an SAE, and a bias, as they come out of a training script.

.. code-block:: json

    {"sae": "mid", "bias": -1.5, "terms": [{"feature": 12, "weight": 0.8, "label": "flattery"}]}
    {"sae": "mid", "bias": -1.5, "weights": [0.0, 0.8, 0.0]}

``weights`` has one number for each feature, from 0 on; zeros are left out. A term may name another ``sae`` than the
whole. Labels and a ``description`` are for people.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from saeguard.types import MAX_TERMS, Term


class BadProbe(ValueError):
    """A file that is no probe; the message names the field."""


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """``bias + sum of weight * feature``."""

    terms: tuple[Term, ...]
    bias: float


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
    terms = _dense(probe) if probe.weights is not None else _listed(probe)
    if not 1 <= len(terms) <= MAX_TERMS:
        raise BadProbe(f"must have 1 to {MAX_TERMS} weights that are not 0, got {len(terms)}")
    return LinearProbe(terms, probe.bias)


def _dense(probe: _Probe) -> tuple[Term, ...]:
    if probe.sae is None:
        raise BadProbe("sae: must be set with weights")
    given = [(f"weights[{feature}]", feature, weight) for feature, weight in enumerate(probe.weights or ()) if weight]
    return tuple(_term(where, probe.sae, feature, weight) for where, feature, weight in given)


def _listed(probe: _Probe) -> tuple[Term, ...]:
    found = []
    for index, one in enumerate(probe.terms or ()):
        sae = one.sae or probe.sae
        if sae is None:
            raise BadProbe(f"terms[{index}].sae: must be set, here or for the whole probe")
        found.append(_term(f"terms[{index}]", sae, one.feature, one.weight))
    return tuple(found)


def _term(where: str, sae: str, feature: int, weight: float) -> Term:
    try:
        return Term(sae, feature, weight)
    except ValueError as err:
        raise BadProbe(f"{where}.{err}") from err
