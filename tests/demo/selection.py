"""Finds, for a plan, the smallest intervention that reaches its goal, on generations of its own seeds."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from demo.bundle import Bundle
from demo.harvest import Harvest
from demo.measure import loss_change, side
from demo.plans import Plan
from demo.tokens import Tokens
from saeguard_sae.discover import Labelled, rank
from saeguard_server.demo.scenarios import Lexicon, ScenarioEdit

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


def select(
    plan: Plan, bundle: Bundle, lexicon: Lexicon, train: Harvest, neutral: list[Tokens], generations: int, seed: int
) -> tuple[ScenarioEdit, ...]:
    """The cheapest trial with the fewest features that reaches the goal, or else the one that comes closest."""
    ranked = {name: _ranked(plan.concept, bundle, name, train) for name in bundle.saes}
    trials: list[Trial] = []
    for count in COUNTS:
        for interventions in candidates(plan, ranked, count):
            trials.append(_try(plan, bundle, lexicon, interventions, neutral, generations, seed))
        if any(reaches(plan, trial) for trial in trials):
            break
    else:
        logger.warning("%s: no trial reached its goal", plan.name)
    return best(plan, trials).interventions


def candidates(plan: Plan, ranked: dict[str, list[tuple[str, int]]], count: int) -> Iterator[tuple[ScenarioEdit, ...]]:
    """Interventions on ``count`` features of one SAE, or of all by turns, weak doses before strong."""
    mixed = [one for turn in zip_longest(*ranked.values()) for one in turn if one is not None]
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
    found = side(bundle, plan, interventions, lexicon, generations, seed)
    harm = loss_change(bundle, interventions, neutral)
    trial = Trial(interventions=interventions, score=found.score.mean, nll=found.nll, loss_change=harm)
    first, names = interventions[0], "+".join(sorted({one.sae for one in interventions}))
    logger.info("%s: %d of %s, %s %s: score %.2f, nll %.2f, neutral loss %+.4f", plan.name, len(interventions), names,
                first.kind, first.value, trial.score, trial.nll, harm)  # fmt: skip
    return trial


def _ranked(concept: str, bundle: Bundle, name: str, train: Harvest) -> list[tuple[str, int]]:
    sae = bundle.saes[name]
    values = sae.dictionary.encode(train.resid[sae.layer])
    return [(name, unit) for unit in rank(Labelled(values, train.labels(concept), train.document), MAX_FEATURES)]


def _intervention(plan: Plan, sae: str, feature: int, dose: float) -> ScenarioEdit:
    if plan.direction == "amplify":
        return ScenarioEdit(sae, feature, "clamp", dose, "max")
    return ScenarioEdit(sae, feature, "scale", dose) if dose else ScenarioEdit(sae, feature, "zero")
