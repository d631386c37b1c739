"""The nouns that callers get back, field for field what the wire carries; made by the engine and the flows."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "feature"]
"""feature: a trigger stopped it."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate for the next token. ``logprob`` in nats."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; log-probabilities are the model's own, before temperature and filters."""

    id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class FeatureReading:
    """Values of the watched features on the token at ``position``, in the order asked for, before any edit."""

    position: int
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class InterventionReceipt:
    """What one edit did; numbers as in ``receipt.proto``."""

    sae: str
    feature: int
    kind: str
    sae_digest: str
    site: str
    tokens_eligible: int
    tokens_edited: int
    mean_activation: float
    max_activation: float
    mean_relative_edit: float
    tokens_capped: int
    policy: str = ""
    """Whose rule made it; empty for the request's own."""
    rule: str = ""
    is_shadow: bool = False
    """Counted as if it were made, and not made."""


@dataclass(frozen=True, slots=True)
class TriggerReceipt:
    """What one trigger saw."""

    policy: str
    """Empty for the request's own."""
    name: str
    is_shadow: bool
    tokens_evaluated: int
    tokens_on: int
    """Evaluated tokens on which its condition held."""
    first_position: int | None
    """Of the token on which it first held."""
    maximum: float
    """Largest value of its sum; -inf where nothing was evaluated. For metrics and audit: never on the wire."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was applied to one request."""

    model_digest: str
    steering_digest: str
    interventions: tuple[InterventionReceipt, ...]
    forward_passes: int
    triggers: tuple[TriggerReceipt, ...] = ()


@dataclass(frozen=True, slots=True)
class StoppedBy:
    """The trigger that ended a generation; ``policy`` is empty for the request's own."""

    policy: str
    name: str


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """Which policies decided about a request: the activation that was in force when it was admitted."""

    activation: int
    revision: int
    enforced: tuple[str, ...]
    shadowed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the request was submitted; 0 to a first token that never came."""

    queue_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """How a generation ended. ``receipt`` is present exactly when there were edits or triggers."""

    finish_reason: FinishReason
    stop_string: str
    prompt_tokens: int
    generated_tokens: int
    timings: Timings
    receipt: Receipt | None
    seed: int
    stopped_by: StoppedBy | None = None
    """Present exactly when the finish reason is feature."""
    policy: PolicyFacts | None = None
    """Present exactly when the server has policies."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step gave one request. ``completion`` is set on the last chunk and only there."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    readings: tuple[FeatureReading, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token the model read. ``offset`` counts characters of the input text; None where there is no such text."""

    id: int
    text: str
    offset: int | None


@dataclass(frozen=True, slots=True)
class ActivationPart:
    """Consecutive tokens of one input under one SAE as a sparse matrix: ``indices[indptr[i]:indptr[i + 1]]``.

    ``indptr`` and ``indices`` are array('I'), ``values`` array('f').
    """

    input: int
    sae: str
    start: int
    tokens: tuple[TokenText, ...]
    indptr: array[int]
    indices: array[int]
    values: array[float]
    last: bool
