"""What parent and child say to each other. The child gets a ``Start``, then commands; it sends ``Ready`` or
``Refused``, then reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from saeguard_server.engine.process.facts import DistantSae
from saeguard_server.engine.protocol import Capabilities, Engine, GenerateTask, InspectTask, ModelInfo
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.errors import SaeguardError
from saeguard_server.observe.metrics import Metrics
from saeguard_server.reply import ActivationPart, Chunk
from saeguard_server.settings import Settings


class InnerEngine(Engine, Protocol):
    """The engine that the child runs, with the tokenizer of its model."""

    @property
    def tokenizer(self) -> Tokenizer: ...


Loader: TypeAlias = Callable[[Settings, Metrics], InnerEngine]
"""Makes the engine in the child; a function of a module, since it travels by its name."""

Samples: TypeAlias = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values of one metric by name and labels."""
Counts: TypeAlias = dict[str, Samples]
"""Everything that a process counted, by metric."""


@dataclass(frozen=True, slots=True)
class Start:
    """The first message to a child."""

    settings: Settings
    load: Loader


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is loaded. ``now`` is the child's ``time.monotonic()``.

    The tokenizer travels as a whole, so that both sides have the same one whatever happens to its files.
    """

    now: float
    model: ModelInfo
    capabilities: Capabilities
    saes: dict[str, DistantSae]
    tokenizer: Tokenizer

    def differs_from(self, other: Ready) -> bool:
        """Whether it would give other answers."""
        return self._identity() != other._identity()

    def _identity(self) -> tuple[str, Capabilities, Mapping[str, str]]:
        return self.model.digest, self.capabilities, {name: sae.digest for name, sae in self.saes.items()}


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine cannot be loaded; ``error`` is what loading raised."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Submit:
    """A task under the number that its events will have."""

    uid: int
    task: GenerateTask | InspectTask


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants this task's events any more."""

    uid: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything and exit."""


Command: TypeAlias = Submit | Cancel | Stop


@dataclass(frozen=True, slots=True)
class Failure:
    """A SaeguardError on its way: their constructors take other arguments than exceptions are pickled with."""

    kind: type[SaeguardError]
    args: tuple[Any, ...]
    facts: dict[str, Any]

    @classmethod
    def of(cls, error: SaeguardError) -> Failure:
        """The error, ready to be sent."""
        return cls(type(error), error.args, vars(error))

    def error(self) -> SaeguardError:
        """The error as it was: class, message, field, seconds to wait."""
        made = self.kind.__new__(self.kind, *self.args)
        vars(made).update(self.facts)
        return made


Event: TypeAlias = Chunk | ActivationPart | Failure | None
"""What a task's owner gets; a failure, a completion, or None after the last activation part ends it."""


@dataclass(frozen=True, slots=True)
class Report:
    """What happened since the last one; sent after each step of the engine and once a second."""

    events: list[tuple[int, Event]]
    is_ready: bool
    taken: int
    """Tasks that have arrived so far."""
    waiting: int
    """Tasks that wait for a slot."""
    counts: Counts | None
    """The metrics, once a second."""
