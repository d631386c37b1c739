"""The demonstration's scenarios: what is asked, what is steered, what is measured, and what the build measured.

Data in ``assets/scenarios.json``, read without torch so that a client can replay it over the wire.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saeguard_server.demo import scorers
from saeguard_server.demo.scorers import Interval, Lexicon

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True, slots=True)
class Intervention:
    """One edit of one feature; ``value`` is null for zero, the factor for scale, else in ``unit``."""

    sae: str
    feature: int
    kind: Literal["zero", "clamp", "scale", "add", "cap", "floor"]
    value: float | None = None
    unit: Literal["raw", "max"] = "raw"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat prompt."""

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must hold of mean scores for the scenario to have worked."""

    base_at_least: float
    base_at_most: float
    steered_at_least: float
    steered_at_most: float

    def holds(self, base: float, steered: float) -> bool:
        """Whether both means are where they should be."""
        in_base = self.base_at_least <= base <= self.base_at_most
        return in_base and self.steered_at_least <= steered <= self.steered_at_most


@dataclass(frozen=True, slots=True)
class Side:
    """What was measured of generations, all steered or all not."""

    score: Interval
    nll: float
    """Nats per token of the generated text under the unsteered model: how fluent it finds the text."""
    repetition: float
    """Share of repeated word trigrams."""
    samples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NeutralChange:
    """What steering does to the loss on held-out documents of one kind, teacher-forced."""

    loss_before: float
    loss_after: float
    kl: float
    """KL(unsteered || steered), nats per token."""
    top_flips: float
    """Share of tokens whose likeliest successor changes."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The build's own figures, by its own engine."""

    generations: int
    base: Side
    steered: Side
    neutral: dict[str, NeutralChange]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing to show. ``prompt`` is a text or a chat."""

    name: str
    title: str
    prompt: str | tuple[Message, ...]
    interventions: tuple[Intervention, ...]
    scorer: str
    max_new_tokens: int
    temperature: float
    expectation: Expectation
    measured: Measured


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Every scenario, the words that tell the languages apart, and neutral texts by kind."""

    scenarios: tuple[Scenario, ...]
    lexicon: Lexicon
    neutral: dict[str, tuple[str, ...]]

    def score(self, scenario: Scenario, text: str) -> float:
        """The scenario's score of a generated text."""
        return scorers.SCORERS[scenario.scorer](text, self.lexicon)


def load(assets: Path = ASSETS) -> Demonstration:
    """The demonstration in a folder of assets."""
    data = json.loads((assets / "scenarios.json").read_text(encoding="utf-8"))
    lexicon = Lexicon(**{language: frozenset(words) for language, words in data["lexicon"].items()})
    neutral = {kind: tuple(texts) for kind, texts in data["neutral"].items()}
    return Demonstration(tuple(_scenario(one) for one in data["scenarios"]), lexicon, neutral)


def _scenario(data: dict[str, Any]) -> Scenario:
    prompt = data.pop("prompt")
    return Scenario(
        prompt=prompt if isinstance(prompt, str) else tuple(Message(**turn) for turn in prompt),
        interventions=tuple(Intervention(**one) for one in data.pop("interventions")),
        expectation=Expectation(**data.pop("expectation")),
        measured=_measured(data.pop("measured")),
        **data,
    )


def _measured(data: dict[str, Any]) -> Measured:
    neutral = {kind: NeutralChange(**change) for kind, change in data["neutral"].items()}
    return Measured(data["generations"], _side(data["base"]), _side(data["steered"]), neutral)


def _side(data: dict[str, Any]) -> Side:
    return Side(Interval(**data["score"]), data["nll"], data["repetition"], tuple(data["samples"]))
