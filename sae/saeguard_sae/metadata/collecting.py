"""Turns the records of many files into one entry per feature, in raw units."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from saeguard_sae.catalogue import BadCatalogue, Example, Feature, PromotedToken
from saeguard_sae.metadata.entries import Entry, Label

Units: TypeAlias = Literal["unit_decoder", "raw"]
"""What a file's activations are counted in: as if every decoder row had length 1, which is how Neuronpedia prepares
most SAEs (not temporal ones, and not top-k ones that are not rescaled by the decoder's norm), or as the SAE gives them.
"""
EXAMPLES = 5
"""Kept per feature, the strongest."""


@dataclass(slots=True)
class Dropped:
    """How much was read and not kept."""

    labels: int = 0
    """Empty, or beside a label that is scored better or came first."""
    examples: int = 0
    """Weaker than those that were kept, or the same text again."""
    statistics: int = 0
    """Densities and promoted tokens of a feature that had them already."""
    other_sources: int = 0
    """Records of sources that were not chosen."""


class Scale:
    """Converts a file's activations to raw ones: ``f_unit = f_raw * norm`` for a decoder row of that length.

    Raises:
        ValueError: norms are needed and missing, or not one per feature.
    """

    def __init__(self, units: Units, decoder_norms: Tensor | None, d_sae: int) -> None:
        if units not in ("unit_decoder", "raw"):
            raise ValueError(f"units must be unit_decoder or raw, got {units!r}")
        self._norms: list[float] | None = None
        if units == "unit_decoder":
            if decoder_norms is None or tuple(decoder_norms.shape) != (d_sae,):
                raise ValueError(f"values in units of a unit decoder need the decoder's {d_sae} norms")
            self._norms = decoder_norms.detach().to("cpu", torch.float64).tolist()

    def value(self, value: float, index: int, where: str) -> float:
        """An activation."""
        return self._checked(value / self._norm(index, where), where)

    def logit(self, value: float, index: int, where: str) -> float:
        """An effect per unit of activation, which grows as that unit does."""
        return self._checked(value * self._norm(index, where), where)

    def _norm(self, index: int, where: str) -> float:
        norm = 1.0 if self._norms is None else self._norms[index]
        if not (isfinite(norm) and norm > 0.0):
            raise BadCatalogue(f"{where}: index: feature {index} has a decoder norm of {norm}: it has no raw units")
        return norm

    @staticmethod
    def _checked(value: float, where: str) -> float:
        if not isfinite(value):
            raise BadCatalogue(f"{where}: a value is too large once it is in raw units")
        return value


@dataclass(slots=True)
class _Known:
    """What is known of one feature so far."""

    label: Label | None = None
    maximum: float | None = None
    density: float | None = None
    top_tokens: tuple[PromotedToken, ...] = ()
    examples: list[Example] = field(default_factory=list)

    def add_label(self, label: Label) -> bool:
        """Whether one of two labels had to go."""
        if not label.text:
            return True
        is_second = self.label is not None
        if self.label is None or _score(label) > _score(self.label):
            self.label = label
        return is_second

    def add_example(self, example: Example) -> bool:
        """Whether one had to go."""
        same = next((one for one in self.examples if one.text == example.text), None)
        if same is not None:
            self.examples.remove(same)
            example = max(same, example, key=lambda one: one.value)
        self.examples.append(example)
        self.examples.sort(key=lambda one: -one.value)
        is_over = len(self.examples) > EXAMPLES
        del self.examples[EXAMPLES:]
        return is_over or same is not None

    def feature(self, index: int) -> Feature:
        """Its line of the catalogue."""
        label = self.label or Label("")
        return Feature(
            index=index,
            label=label.text or None,
            label_metric=label.metric,
            label_score=label.score,
            maximum=self.maximum,
            density=self.density,
            top_tokens=self.top_tokens,
            examples=tuple(self.examples),
        )


class Collector:
    """Takes entries in any order."""

    def __init__(self, d_sae: int, scale: Scale, source: str | None) -> None:
        self.dropped = Dropped()
        self.read = 0
        self._d_sae, self._scale, self._source = d_sae, scale, source
        self._known: dict[int, _Known] = {}
        self._taken: str | None = None
        self._left: dict[str, None] = {}

    def add(self, entry: Entry) -> None:
        """One record.

        Raises:
            BadCatalogue: its feature is outside the SAE, or it is about another SAE than those before.
        """
        self.read += 1
        if entry.source is not None and not self._is_chosen(entry, entry.source):
            self.dropped.other_sources += 1
            return
        if not 0 <= entry.index < self._d_sae:
            raise BadCatalogue(f"{entry.where}: index: {entry.index} is outside 0..{self._d_sae - 1}")
        self._take(entry, self._known.setdefault(entry.index, _Known()))

    def features(self) -> dict[int, Feature]:
        """Everything, by index.

        Raises:
            BadCatalogue: nothing was of the chosen source.
        """
        if self._taken is None and self._left:
            raise BadCatalogue(
                f"no record of source {self._source!r}; the files hold {', '.join(list(self._left)[:5])}"
            )
        return {index: known.feature(index) for index, known in sorted(self._known.items())}

    def _is_chosen(self, entry: Entry, source: str) -> bool:
        name = f"{entry.model}/{source}" if entry.model else source
        if self._source not in (None, name, source):
            self._left[name] = None
            return False
        if self._taken not in (None, name):
            raise BadCatalogue(
                f"{entry.where}: layer: {name}, but {self._taken} before; choose one of them as the source"
            )
        self._taken = name
        return True

    def _take(self, entry: Entry, known: _Known) -> None:
        index, where = entry.index, entry.where
        self.dropped.labels += sum(known.add_label(label) for label in entry.labels)
        for example in entry.examples:
            value = self._scale.value(example.value, index, where)
            self.dropped.examples += known.add_example(Example(example.text, example.token_index, value))
            known.maximum = max(value, known.maximum or value)
        if entry.maximum is not None:
            value = self._scale.value(entry.maximum, index, where)
            known.maximum = value if known.maximum is None else max(value, known.maximum)
        if entry.density is not None:
            self.dropped.statistics += known.density is not None
            known.density = entry.density if known.density is None else known.density
        if entry.top_tokens:
            self.dropped.statistics += bool(known.top_tokens)
            known.top_tokens = known.top_tokens or self._raw(entry)

    def _raw(self, entry: Entry) -> tuple[PromotedToken, ...]:
        return tuple(
            PromotedToken(one.token, self._scale.logit(one.logit, entry.index, entry.where)) for one in entry.top_tokens
        )


def _score(label: Label) -> float:
    return float("-inf") if label.score is None else label.score
