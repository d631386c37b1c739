"""The nouns that every layer shares: what a caller asks for. A value that exists here is valid in itself.

Whether names exist and positions can be reached is for ``flows`` to say, which knows what is served.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import TypeAlias

from saeguard_sae.edits import FLOAT32_MAX
from saeguard_server.caller import LOCAL, Caller
from saeguard_server.interventions import FeatureRef, Intervention, Trigger, check_one_edit_per_feature

ROLES = ("system", "user", "assistant")

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_CONVERSATION_CHARS = 256


@dataclass(frozen=True, slots=True)
class TextInput:
    """Text for the tokenizer, which adds its usual special tokens (BOS)."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role: must be one of {', '.join(ROLES)}, got {self.role!r}")


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation for the tokenizer's chat template."""

    messages: tuple[ChatMessage, ...]

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("messages: must not be empty")


@dataclass(frozen=True, slots=True)
class TokenInput:
    """Token ids, taken as they are."""

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("ids: must not be empty")


ModelInput: TypeAlias = TextInput | ChatInput | TokenInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; fields as on the wire, None is the server's choice."""

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: must be at least 1, got {self.max_new_tokens}")
        if self.temperature != 0 and not 0.001 <= self.temperature <= 100:
            raise ValueError(f"temperature: must be 0 (greedy) or 0.001 to 100, got {self.temperature}")
        _within("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above_low=True)
        if self.top_k < 0:
            raise ValueError(f"top_k: must be at least 0, got {self.top_k}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs: must be 0 to {MAX_LOGPROBS}, got {self.logprobs}")
        _check_stop(self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What Generate and GenerateStream ask for."""

    prompt: ModelInput
    sampling: Sampling = field(default_factory=Sampling)
    interventions: tuple[Intervention, ...] = ()
    max_relative_edit: float | None = None
    watch: tuple[FeatureRef, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    policies: tuple[str, ...] = ()
    """Policies that shall apply whether or not their target and rollout choose this request."""
    conversation: str = ""
    """What a rollout by conversation hashes."""
    min_policy_activation: int | None = None
    """The oldest activation of policies that may decide about this request."""

    def __post_init__(self) -> None:
        limit = self.max_relative_edit
        if limit is not None and not (isfinite(limit) and 0.0 < limit <= FLOAT32_MAX):
            raise ValueError(f"max_relative_edit: must be finite and above 0, got {limit}")
        check_one_edit_per_feature(self.interventions)
        if len(set(self.watch)) != len(self.watch):
            raise ValueError("watch: a feature is named twice")
        names = [one.name for one in self.triggers]
        if len(set(names)) != len(names):
            raise ValueError("triggers: a name is given twice")
        if len(set(self.policies)) != len(self.policies):
            raise ValueError("policies: a policy is named twice")
        if len(self.conversation) > MAX_CONVERSATION_CHARS:
            raise ValueError(f"conversation: at most {MAX_CONVERSATION_CHARS} characters, got {len(self.conversation)}")


@dataclass(frozen=True, slots=True)
class TopK:
    """The ``k`` largest activations of each token."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"top_k: must be at least 1, got {self.k}")


@dataclass(frozen=True, slots=True)
class Threshold:
    """Every activation above ``value``."""

    value: float

    def __post_init__(self) -> None:
        if not (isfinite(self.value) and 0.0 <= self.value <= FLOAT32_MAX):
            raise ValueError(f"threshold: must be finite and at least 0, got {self.value}")


@dataclass(frozen=True, slots=True)
class Named:
    """Just these features, zeros included."""

    features: tuple[FeatureRef, ...]

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("features: must not be empty")
        if len(set(self.features)) != len(self.features):
            raise ValueError("features: a feature is named twice")


Selection: TypeAlias = TopK | Threshold | Named


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRequest:
    """What GetActivations asks for: every input under every SAE."""

    inputs: tuple[ModelInput, ...]
    saes: tuple[str, ...]
    selection: Selection
    interventions: tuple[Intervention, ...] = ()

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs: must not be empty")
        if not self.saes and not isinstance(self.selection, Named):
            raise ValueError("saes: must not be empty unless features are named")
        if len(set(self.saes)) != len(self.saes):
            raise ValueError("saes: an SAE is named twice")
        check_one_edit_per_feature(self.interventions)


def _within(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    ok = (low < value if above_low else low <= value) and value <= high and value != inf
    if not ok:
        raise ValueError(
            f"{name}: must be {'above' if above_low else 'at least'} {low} and at most {high}, got {value}"
        )


def _check_stop(stop: tuple[str, ...]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise ValueError(f"stop: at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
    for index, text in enumerate(stop):
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise ValueError(f"stop[{index}]: must have 1 to {MAX_STOP_CHARS} characters, got {len(text)}")


@dataclass(frozen=True, slots=True)
class Call:
    """One RPC: its id for logs and receipts, ``deadline`` on the ``time.monotonic`` clock in seconds, and who calls."""

    request_id: str
    deadline: float
    caller: Caller = LOCAL
    arrived: float = field(default_factory=time.monotonic, compare=False)
    """On the same clock: what waits before the engine is part of how long an answer took."""
