"""One request inside the engine: its tokens, how far the model has read them, and what it has sent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from saeguard_server.engine.protocol import GenerateTask, InspectTask, ResolvedGuard
from saeguard_server.engine.text import Assembler
from saeguard_server.errors import SaeguardError
from saeguard_server.reply import ActivationPart, Chunk, Timings, Token

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
    stops: tuple[ResolvedGuard, ...] = field(init=False)
    """The guards that can end it."""
    computed: int = 0
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    """Blocks of KV memory, in the order of its tokens."""
    keys: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were needed."""
    learned: int = 0
    """Full blocks that others can find."""
    reused: int = 0
    """Tokens that were not read again because somebody had read them."""
    reported: int = 0
    """Position up to which readings and log-probabilities of the prompt were sent."""
    held: Token | None = None
    """The last token, chosen and kept back until the model has read it: a trigger may stop it."""
    forward_passes: int = 0
    is_done: bool = False
    prefix: dict[str, Tensor] = field(default_factory=dict)
    """By SAE that reads a token together with all before it: what an inspection has seen so far."""
    submitted: float = field(init=False)
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.task.tokens)
        self.stops = tuple(one for one in self.task.steering.guards if one.stops)
        self.submitted = self.task.call.arrived

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.task.tokens)

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.task.tokens)

    def must_be_read(self, position: int, *, is_special: bool) -> bool:
        """Whether a trigger could stop the token at a position: then it is sent only when the model has read it."""
        return any(one.first <= position < one.last and (one.special or not is_special) for one in self.stops)

    def timings(self) -> Timings:
        """Seconds since the request was submitted."""
        return Timings(
            queue_s=self.started - self.submitted,
            time_to_first_token_s=self.first_token - self.submitted if self.first_token else 0.0,
            total_s=time.monotonic() - self.submitted,
        )
