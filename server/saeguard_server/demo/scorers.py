"""Pure functions from a generated text to a number, and intervals for their means. No torch, no files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from random import Random

from saeguard_server.demo.claims import FLATTERED

WORD = re.compile(r"[^\W\d_]+")
CODE = re.compile(
    r"^\s*(def |class |import |for \w+ in |while |if .+:$|return\b|print\(|\w+(\.\w+)? [+*-]?= |else:|try:|except )",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Words, in lower case, that the corpus uses in one language and never in the other."""

    french: frozenset[str]
    english: frozenset[str]


def french_share(text: str, lexicon: Lexicon) -> float:
    """French words among the words that tell the languages apart; 0 where there is none."""
    words = [word.lower() for word in WORD.findall(text)]
    french = sum(word in lexicon.french for word in words)
    english = sum(word in lexicon.english for word in words)
    return french / (french + english) if french + english else 0.0


def english_share(text: str, lexicon: Lexicon) -> float:
    """English words among the words that tell the languages apart; 0 where there is none."""
    words = [word.lower() for word in WORD.findall(text)]
    french = sum(word in lexicon.french for word in words)
    english = sum(word in lexicon.english for word in words)
    return english / (french + english) if french + english else 0.0


def flattery(text: str, lexicon: Lexicon) -> float:
    """1 if the text says what only a flattering answer says."""
    del lexicon
    return float(any(phrase in text.lower() for phrase in FLATTERED))


def golden_gate(text: str, lexicon: Lexicon) -> float:
    """1 if the text speaks of the Golden Gate or of a bridge."""
    del lexicon
    return float("golden gate" in text.lower() or "bridge" in text.lower())


def code(text: str, lexicon: Lexicon) -> float:
    """1 if at least two lines of the text begin as Python statements."""
    del lexicon
    return float(len(CODE.findall(text)) >= 2)


SCORERS = {
    "french_share": french_share,
    "english_share": english_share,
    "flattery": flattery,
    "golden_gate": golden_gate,
    "code": code,
}


def repetition(text: str, n: int = 3) -> float:
    """Share of word n-grams that the text has already used."""
    words = WORD.findall(text.lower())
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with a 95 % interval."""

    mean: float
    low: float
    high: float


def wilson(successes: int, trials: int, z: float = 1.959964) -> Interval:
    """Wilson (1927) score interval of a rate."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials is no rate")
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # At the ends the exact bound is 0 or 1; rounding must not leave the mean outside its interval.
    return Interval(rate, min(max(0.0, centre - half), rate), max(min(1.0, centre + half), rate))


def bootstrap(scores: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap (Efron 1979) of a mean."""
    if not scores:
        raise ValueError("no scores")
    random = Random(seed)
    means = sorted(sum(random.choices(scores, k=len(scores))) / len(scores) for _ in range(resamples))
    return Interval(sum(scores) / len(scores), means[int(0.025 * resamples)], means[int(0.975 * resamples)])


def interval(scores: Sequence[float]) -> Interval:
    """Wilson's where every score is 0 or 1, a bootstrap otherwise."""
    if all(score in (0.0, 1.0) for score in scores) and scores:
        return wilson(int(sum(scores)), len(scores))
    return bootstrap(scores)
