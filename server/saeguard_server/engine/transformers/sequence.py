"""One request inside the engine: its tokens, how far the model has read them, and what it has sent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from saeguard_server.engine.protocol import GenerateTask, InspectTask
from saeguard_server.engine.text import Assembler
from saeguard_server.engine.transformers.capture import Capture
from saeguard_server.errors import SaeguardError
from saeguard_server.reply import ActivationPart, Chunk, Timings

Event: TypeAlias = Chunk | ActivationPart | SaeguardError
"""What a request's owner gets; an error, a completion, or None after the last activation part ends it."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A task on its way. ``computed`` tokens have been read by the model; ``slot`` is its row while it runs."""

    uid: int
    task: GenerateTask | InspectTask
    text: Assembler | None
    send: Callable[[Event | None], None]
    """Takes an event for the request's owner; called on the engine's thread."""
    tokens: list[int] = field(init=False)
    computed: int = 0
    slot: int = -1
    forward_passes: int = 0
    is_done: bool = False
    capture: Capture | None = None
    """What an inspection sees."""
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.task.tokens)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.task.tokens)

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.task.tokens)

    def timings(self) -> Timings:
        """Seconds since the request was submitted."""
        return Timings(
            queue_s=self.started - self.submitted,
            time_to_first_token_s=self.first_token - self.submitted,
            total_s=time.monotonic() - self.submitted,
        )
