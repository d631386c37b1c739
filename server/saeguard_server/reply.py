"""The nouns that callers get back, field for field what the wire carries; made by the engine and the flows."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length"]


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


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was applied to one request."""

    model_digest: str
    steering_digest: str
    interventions: tuple[InterventionReceipt, ...]
    forward_passes: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the request was submitted."""

    queue_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """How a generation ended. ``receipt`` is present exactly when there were interventions."""

    finish_reason: FinishReason
    stop_string: str
    prompt_tokens: int
    generated_tokens: int
    timings: Timings
    receipt: Receipt | None
    seed: int


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
