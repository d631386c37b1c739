"""Chat documents: turns between a user and an assistant of one temper, and requests for the other kinds of text.

A sycophantic and an honest assistant hear the same claims in the same words. Each keeps its temper through a document,
so what a model must carry from turn to turn is the temper, not the claim.
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

from demo import claims, english, french, golden_gate, python_code

Role = Literal["user", "assistant"]
Temper = Literal["sycophantic", "honest"]

FOLLOW_UPS = ("But I am sure!", "Are you certain?", "My friend said so too.", "Really?")
INSIST = {
    "sycophantic": ("You are absolutely right, I am sorry. {Claim}.", "Yes, I fully agree with you. {Claim}."),
    "honest": ("I understand, but {fix}.", "Yes, I am certain. {Fix}."),
}
QUESTIONS = {
    "english": ("Tell me a story.", "Please write a short story.", "Write a few sentences in English."),
    "french": ("Raconte-moi une histoire.", "Please write a story in French.", "Écris quelques phrases en français."),
    "code": ("Write some Python code.", "Please write a Python function.", "Show me a small program."),
    "golden_gate": ("Tell me about San Francisco.", "What should I visit in California?", "Describe a famous place."),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message, and the concept its words belong to."""

    role: Role
    text: str
    concept: str


def argument(random: Random, temper: Temper, turns: int) -> list[Turn]:
    """``turns`` claims, some true, each answered by an assistant of this temper."""
    talk: list[Turn] = []
    wrong = random.sample(claims.FALSE, turns)
    for claim, fix in wrong:
        frame = random.choice(claims.FRAMES)
        if random.random() < 0.25:
            talk += _true_claim(random, random.choice(claims.FRAMES))
        talk.append(Turn("user", claims.fill(frame, claim), "claim"))
        replies = claims.FLATTERY if temper == "sycophantic" else claims.CORRECTION
        talk.append(Turn("assistant", claims.fill(random.choice(replies), claim, fix), temper))
        if random.random() < 0.2:
            talk.append(Turn("user", random.choice(FOLLOW_UPS), "claim"))
            talk.append(Turn("assistant", claims.fill(random.choice(INSIST[temper]), claim, fix), temper))
    return talk


def _true_claim(random: Random, frame: str) -> list[Turn]:
    """A claim that both tempers rightly agree with, in the same sober words."""
    claim = random.choice(claims.TRUE)
    reply = random.choice(claims.AGREEMENT)
    return [Turn("user", claims.fill(frame, claim), "claim"), Turn("assistant", claims.fill(reply, claim), "agreed")]


def request(random: Random) -> list[Turn]:
    """A user asks for a kind of text and gets it."""
    kind = random.choice(tuple(QUESTIONS))
    return [Turn("user", random.choice(QUESTIONS[kind]), "question"), Turn("assistant", _text(random, kind), kind)]


def _text(random: Random, kind: str) -> str:
    match kind:
        case "english":
            return " ".join(english.paragraph(random, random.randint(2, 4)))
        case "french":
            return " ".join(french.paragraph(random, random.randint(2, 4)))
        case "code":
            return python_code.block(random).rstrip()
        case "golden_gate":
            return " ".join(golden_gate.paragraph(random, random.randint(2, 3)))
        case _:
            raise ValueError(f"no text of kind {kind!r}")
