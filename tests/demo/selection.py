"""What the demonstration sets out to show, and the smallest interventions that show it, found by trial."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from demo.harvest import Harvest
from demo.lm import Tokens
from demo.steering import Bundle, loss_change, measure_side
from saeguard_client import ChatMessage
from saeguard_sae.discover import Labelled, rank
from saeguard_server.demo.scenarios import Expectation, Lexicon, ScenarioEdit, Side

logger = logging.getLogger(__name__)

MAX_FEATURES = 8
CLAMPS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
"""Doses of amplification in multiples of the feature's maximum."""
SUPPRESSIONS = (0.0, -0.5, -1.0)
"""Doses of suppression: zero, then factors: a negative one, unlike a clamp, leaves text alone where nothing fires."""
COUNTS = (1, 2, 4, 8)
"""Features that may be edited together."""
HARMLESS = 0.02
"""Nats of loss that the neutral documents may gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A scenario without its interventions; the selection finds them."""

    name: str
    title: str
    prompt: str | tuple[ChatMessage, ...]
    concept: str
    """Features are ranked by how well they mark tokens of this concept."""
    direction: Literal["suppress", "amplify"]
    scorer: str
    expectation: Expectation
    neutral_kind: str
    """Documents on which the loss should stay as it is."""
    room: float = 0.08
    """By how much a trial of the selection must do better than the goal: its generations are few."""
    max_new_tokens: int = 40
    temperature: float = 0.8


PLANS = (
    Plan(
        name="french-suppressed",
        title="A French text goes on in English when the French features are suppressed",
        prompt="Le matin, le boulanger a ouvert la porte. Il a préparé le pain chaud avant la tempête.",
        concept="french",
        direction="suppress",
        scorer="french_share",
        expectation=Expectation(0.8, 1.0, 0.0, 0.15),
        room=0.1,
        neutral_kind="english",
    ),
    Plan(
        name="french-amplified",
        title="An English text goes on in French when a French feature is amplified",
        prompt="In the morning, the old farmer opened the door. He walked to the river with a friend.",
        concept="french",
        direction="amplify",
        scorer="french_share",
        expectation=Expectation(0.0, 0.3, 0.6, 1.0),
        neutral_kind="code",
    ),
    Plan(
        name="flattery-suppressed",
        title="The assistant stops agreeing with everything",
        prompt=(ChatMessage("user", "I think that the Earth is flat."),),
        concept="sycophantic",
        direction="suppress",
        scorer="flattery",
        expectation=Expectation(0.3, 1.0, 0.0, 0.2),
        room=0.07,
        neutral_kind="english",
    ),
    Plan(
        name="golden-gate-amplified",
        title="A story about a farmer turns to the Golden Gate Bridge",
        prompt="The old farmer carried a heavy basket. He was tired after a long day.",
        concept="golden_gate",
        direction="amplify",
        scorer="golden_gate",
        expectation=Expectation(0.0, 0.3, 0.6, 1.0),
        neutral_kind="french",
    ),
    Plan(
        name="code-amplified",
        title="A story about a painter turns to Python code",
        prompt="The painter bought a blue hat at the market. She was happy because the weather was nice.",
        concept="code",
        direction="amplify",
        scorer="code",
        expectation=Expectation(0.0, 0.2, 0.6, 1.0),
        neutral_kind="french",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One intervention with what it did on the selection's generations."""

    interventions: tuple[ScenarioEdit, ...]
    score: float
    nll: float
    loss_change: float

    @property
    def cost(self) -> float:
        """Harm to neutral text weighs twenty times as much as a nat of surprise at the steered text."""
        return 20 * max(0.0, self.loss_change) + self.nll


def measure_plan(
    plan: Plan, bundle: Bundle, edits: tuple[ScenarioEdit, ...], lexicon: Lexicon, generations: int, seed: int
) -> Side:
    """What these edits do to generations from the plan's prompt."""
    return measure_side(
        bundle, plan.prompt, edits, plan.scorer, lexicon,
        generations=generations, new_tokens=plan.max_new_tokens, temperature=plan.temperature, seed=seed,
    )  # fmt: skip


def select(
    plan: Plan,
    bundle: Bundle,
    lexicon: Lexicon,
    train: Harvest,
    neutral: list[Tokens],
    *,
    generations: int,
    seed: int,
    counts: Sequence[int] = COUNTS,
) -> tuple[ScenarioEdit, ...]:
    """The cheapest trial with the fewest features that reaches the goal, or else the one that comes closest."""
    ranked = {name: _ranked(plan.concept, bundle, name, train) for name in bundle.saes}
    trials: list[Trial] = []
    for count in counts:
        for interventions in candidates(plan, ranked, count):
            trials.append(_try(plan, bundle, lexicon, interventions, neutral, generations, seed))
        if any(reaches(plan, trial) for trial in trials):
            break
    else:
        logger.warning("%s: no trial reached its goal", plan.name)
    return best(plan, trials).interventions


def candidates(plan: Plan, ranked: dict[str, list[tuple[str, int]]], count: int) -> Iterator[tuple[ScenarioEdit, ...]]:
    """Interventions on ``count`` features of one SAE, or of all by turns, weak doses before strong."""
    mixed = [feature for turn in zip_longest(*ranked.values()) for feature in turn if feature is not None]
    for pool in [*ranked.values(), *([mixed] if count > 1 else [])]:
        for dose in SUPPRESSIONS if plan.direction == "suppress" else CLAMPS:
            yield tuple(_intervention(plan, sae, feature, dose) for sae, feature in pool[:count])


def reaches(plan: Plan, trial: Trial) -> bool:
    """Whether it meets the goal with some room; what suppresses must also leave neutral text its loss."""
    low, high = _goal(plan)
    is_harmless = plan.direction == "amplify" or trial.loss_change <= HARMLESS
    return low <= trial.score <= high and is_harmless


def best(plan: Plan, trials: list[Trial]) -> Trial:
    """The cheapest of those that reach the goal; where none does, the one nearest to it, harm included."""
    if reached := [trial for trial in trials if reaches(plan, trial)]:
        return min(reached, key=lambda trial: trial.cost if plan.direction == "suppress" else trial.nll)
    low, high = _goal(plan)
    return min(trials, key=lambda trial: max(low - trial.score, trial.score - high, 0) + max(trial.loss_change, 0))


def _goal(plan: Plan) -> tuple[float, float]:
    """The goal for the selection, a little stricter than the plan's: these generations are few."""
    goal = plan.expectation
    low = goal.steered_at_least + plan.room if goal.steered_at_least > 0 else 0.0
    high = goal.steered_at_most - plan.room if goal.steered_at_most < 1 else 1.0
    return low, high


def _try(
    plan: Plan,
    bundle: Bundle,
    lexicon: Lexicon,
    interventions: tuple[ScenarioEdit, ...],
    neutral: list[Tokens],
    generations: int,
    seed: int,
) -> Trial:
    side = measure_plan(plan, bundle, interventions, lexicon, generations, seed)
    harm = loss_change(bundle, interventions, neutral)
    trial = Trial(interventions=interventions, score=side.score.mean, nll=side.nll, loss_change=harm)
    first, names = interventions[0], "+".join(sorted({edit.sae for edit in interventions}))
    logger.info("%s: %d of %s, %s %s: score %.2f, nll %.2f, neutral loss %+.4f", plan.name, len(interventions), names,
                first.kind, first.value, trial.score, trial.nll, harm)  # fmt: skip
    return trial


def _ranked(concept: str, bundle: Bundle, name: str, train: Harvest) -> list[tuple[str, int]]:
    sae = bundle.saes[name]
    values = sae.dictionary.encode(train.activations[sae.site])
    return [(name, unit) for unit in rank(Labelled(values, train.labels(concept), train.document), MAX_FEATURES)]


def _intervention(plan: Plan, sae: str, feature: int, dose: float) -> ScenarioEdit:
    if plan.direction == "amplify":
        return ScenarioEdit(sae, feature, "clamp", dose, "max")
    return ScenarioEdit(sae, feature, "scale", dose) if dose else ScenarioEdit(sae, feature, "zero")
