"""What the demonstration sets out to show, before any feature is known."""

from dataclasses import dataclass
from typing import Literal

from saeguard_client import ChatMessage
from saeguard_server.demo.scenarios import Expectation


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
