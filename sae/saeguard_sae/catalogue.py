"""What is known about an SAE's features: labels with their scores, statistics, promoted tokens, examples.

On disk it is ``features.jsonl`` (one feature a line) and ``quality.json`` beside the SAE's weights; both optional.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")

FEATURES = "features.jsonl"


class CatalogueToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token that the feature's decoder row makes likelier. ``logit`` is its direct effect per unit of activation."""

    token: str
    logit: float


class Example(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text in which the feature fired with ``value`` on the token at ``token_index``."""

    text: str
    token_index: int
    value: float


class CatalogueFeature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of ``features.jsonl``; null means unknown."""

    index: int
    label: str | None = None
    label_metric: str | None = None
    """What ``label_score`` measures: auroc or f1, or as those who scored an imported label call it."""
    label_score: float | None = None
    """Held-out score of the label."""
    maximum: float | None = None
    """Largest activation seen."""
    quantiles: dict[str, float] = {}
    """Of the positive activations, by probability such as "0.99"."""
    density: float | None = None
    """Share of tokens on which the feature fires."""
    top_tokens: tuple[CatalogueToken, ...] = ()
    examples: tuple[Example, ...] = ()


class Quality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well the SAE stands in for the activation; cross-entropies in nats per token."""

    l0: float | None = None
    fvu: float | None = None
    ce_base: float | None = None
    ce_spliced: float | None = None
    ce_mean_ablated: float | None = None
    dead_share: float | None = None
    tokens: int | None = None
    """Tokens these were measured on."""


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """Features by index; a feature without a line is known by its index alone."""

    features: dict[int, CatalogueFeature] = {}
    quality: Quality | None = None

    def feature(self, index: int) -> CatalogueFeature:
        """What is known of a feature; an empty entry when nothing is."""
        return self.features.get(index) or CatalogueFeature(index=index)


class BadCatalogue(ValueError):
    """A catalogue file that cannot be used; the message names the file and line."""


def read_catalogue(directory: Path, d_sae: int) -> Catalogue:
    """The catalogue beside an SAE's weights, empty where there is none.

    Raises:
        BadCatalogue: malformed, an index outside the SAE, or one given twice.
    """
    lines = directory / FEATURES
    features = read_features(lines, d_sae) if lines.is_file() else {}
    quality = directory / "quality.json"
    found = _decode(quality.read_bytes(), Quality, str(quality)) if quality.is_file() else None
    return Catalogue(features=features, quality=found)


def read_features(file: Path, d_sae: int | None = None) -> dict[int, CatalogueFeature]:
    """The features of a ``features.jsonl``, by index; without ``d_sae`` any index is allowed.

    Raises:
        BadCatalogue: malformed, an index outside the SAE, or one given twice.
    """
    features: dict[int, CatalogueFeature] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            one = _decode(line, CatalogueFeature, f"{file}:{number}")
            if one.index < 0 or one.index in features or (d_sae is not None and one.index >= d_sae):
                allowed = "0 and above" if d_sae is None else f"0..{d_sae - 1}"
                raise BadCatalogue(f"{file}:{number}: index {one.index} is repeated or outside {allowed}")
            features[one.index] = one
    return features


def _decode(data: bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as err:
        raise BadCatalogue(f"{where}: {err}") from err
