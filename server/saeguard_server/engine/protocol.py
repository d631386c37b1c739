"""What an engine is to the rest of the server: requests in, a stream of events out, and what it can do.

Everything a task holds is already resolved and checked by ``flows``: names are found, positions can be reached.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from saeguard.catalog import Model
from saeguard.requests import Sampling
from saeguard.results import ActivationPart, StreamChunk
from saeguard.types import Operator, Window
from saeguard_sae.edits import Affine
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Site
from saeguard_server.caller import Call
from saeguard_server.errors import NonFiniteOutput

# How far one steering takes the model from another on the same tokens, measured from the logits as they are made.
#
# Two tasks read the same tokens, each under its own steering, and hand their logits here. What waits for the other
# side stays on the device; it is two rows of the vocabulary for every token at most.


Side: TypeAlias = Literal["steered", "unsteered"]


class Divergence:
    """KL(steered || unsteered) of the next-token distributions in nats, at positions ``[first, first + count)``.

    Position p's logits predict the token at p + 1. A task is read again from its first token when it gave its memory
    up; what comes twice is the same and counts once.
    """

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count
        self._waiting: dict[Side, dict[int, Tensor]] = {"steered": {}, "unsteered": {}}
        self._found: dict[int, Tensor] = {}

    def offer(self, side: Side, start: int, logits: Tensor) -> None:
        """logits [T, vocabulary] of one side at positions ``[start, start + T)``."""
        other: Side = "unsteered" if side == "steered" else "steered"
        first, last = max(start, self._first), min(start + len(logits), self._first + self._count)
        wanted = [position for position in range(first, last) if position not in self._found]
        for position in wanted:
            row = logits[position - start].log_softmax(dim=-1)
            match = self._waiting[other].pop(position, None)
            if match is None:
                self._waiting[side][position] = row
            else:
                pair = (row, match) if side == "steered" else (match, row)
                self._found[position] = _kl(*pair)

    def result(self) -> tuple[float, ...]:
        """The divergence at each position, in order.

        Raises:
            NonFiniteOutput: a side's logits were not finite.
        """
        assert len(self._found) == self._count, "both sides were read to the end"
        if not self._count:
            return ()
        values = torch.stack([self._found[self._first + index] for index in range(self._count)])
        if not values.isfinite().all():
            raise NonFiniteOutput("the model's output is not finite for this request; an edit may be too large")
        return tuple(values.clamp_min(0.0).tolist())


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Log-probabilities [vocabulary] of two distributions -> their divergence, a scalar."""
    return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do; read at admission, so that what it cannot do is refused by name."""

    engine: str
    sites: frozenset[Site]
    kinds: frozenset[str]
    conditions: bool = False
    """Whether it decides conditions: guards, and edits that depend on one."""
    compares: bool = False
    """Whether two tasks can be measured against each other."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Who wants an edit or a condition: a policy's rule or trigger by its name, the request itself where empty."""

    policy: str = ""
    rule: str = ""


OWN: Final = Origin()
"""The request's own interventions."""


@dataclass(frozen=True, slots=True)
class ResolvedEdit:
    """One edit as the engine applies it: to tokens at positions ``[first, last)``, in raw feature units."""

    sae: str
    feature: int
    kind: str
    affine: Affine
    first: int
    last: int
    special: bool
    """Also on special tokens."""
    gate: int | None = None
    """Index of the guard that must be on; None is always."""
    is_shadow: bool = False
    """Counted as if it were made, and not made."""
    is_limited: bool = True
    """Whether ``Steering.max_relative_edit`` may shorten it: a policy's edits are never shortened by a request."""
    origin: Origin = OWN


@dataclass(frozen=True, slots=True)
class Probe:
    """``bias + sum of weight * feature``, of features as they are before any edit of their site."""

    terms: tuple[tuple[str, int, float], ...]
    """SAE, feature, weight."""
    bias: float = 0.0


@dataclass(frozen=True, slots=True)
class ResolvedGuard:
    """A condition as the engine decides it on every token at positions ``[first, last)``, in raw feature units.

    ``comparison`` and ``window`` as in ``Condition``. Other tokens leave it as it is.
    """

    probe: Probe
    comparison: Operator
    threshold: float
    release: float
    """Equal to the threshold where there is no hysteresis."""
    window: Window
    first: int
    last: int
    special: bool
    latches: bool = False
    """Once on, always on: edits that a trigger applies from then on."""
    stops: bool = False
    """The generation ends when it comes on."""
    is_trigger: bool = False
    """Whether receipts tell of it; an edit's own condition is told by the edit."""
    is_shadow: bool = False
    origin: Origin = OWN


@dataclass(frozen=True, slots=True)
class Steering:
    """All edits and guards of one request, the limit on ``|edit| / |x|`` per site, and their digest (hex SHA-256)."""

    edits: tuple[ResolvedEdit, ...] = ()
    max_relative_edit: float = float("inf")
    digest: str = ""
    guards: tuple[ResolvedGuard, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateTask:
    """One generation. ``sampling`` has its maximum and seed filled in."""

    call: Call
    tokens: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    seed: int
    steering: Steering = Steering()
    watch: tuple[tuple[str, int], ...] = ()
    measure: tuple[Divergence, Side] | None = None
    """Where its prompt's logits go, and for which side; with ``prompt_logprobs``, on an engine that ``compares``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """What to keep of one SAE's activations: the ``top_k`` largest, those above ``threshold``, or ``features``."""

    sae: str
    top_k: int | None = None
    threshold: float | None = None
    features: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectTask:
    """One input to read. ``index`` is its place in the caller's request."""

    call: Call
    index: int
    tokens: tuple[int, ...]
    offsets: tuple[int | None, ...]
    picks: tuple[Pick, ...]
    steering: Steering = Steering()


class Engine(Protocol):
    """A model that runs. Its methods are called on the event loop; its work happens elsewhere."""

    @property
    def model(self) -> Model: ...

    @property
    def saes(self) -> Mapping[str, LoadedSae]: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def is_ready(self) -> bool:
        """Whether a task submitted now would be taken up."""
        ...

    def queued(self) -> int:
        """Tasks that wait for a slot."""
        ...

    def generate(self, task: GenerateTask) -> AsyncGenerator[StreamChunk]:
        """Chunks as they are made; the last has a completion. Closing the iterator cancels the task.

        Raises:
            SaeguardError: DeadlineExceeded, NonFiniteOutput, Unavailable or InternalFailure.
        """
        ...

    def inspect(self, task: InspectTask) -> AsyncGenerator[ActivationPart]:
        """Activations, a part per SAE and chunk of the input, in order of position. Same errors as ``generate``."""
        ...

    def start(self) -> None: ...

    def stop(self) -> None:
        """Ends the engine; whatever still runs fails with Unavailable."""
        ...
