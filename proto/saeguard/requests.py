"""What the RPCs ask for: inputs, sampling, requests. A value that exists is valid in itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from saeguard.checks import (
    FLOAT32_MAX,
    MAX_UINT64,
    FieldError,
    check_bool,
    check_choice,
    check_instance,
    check_integer,
    check_limit,
    check_number,
    check_sequence,
    check_text,
    store,
    store_integer,
    store_several,
    store_texts,
)
from saeguard.types import EDITS, FeatureRef, Intervention, Trigger, check_edited_once

CHAT_ROLES: Final = ("system", "user", "assistant")
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_LOGPROBS: Final = 20
MAX_CONVERSATION_CHARS: Final = 256


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str

    def __post_init__(self) -> None:
        check_choice("role", self.role, CHAT_ROLES)
        check_text("content", self.content)


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation for the tokenizer's chat template."""

    messages: Sequence[ChatMessage]

    def __post_init__(self) -> None:
        store_several(self, "messages", ChatMessage, "a ChatMessage")
        if not self.messages:
            raise FieldError("messages", "must not be empty")


@dataclass(frozen=True, slots=True)
class TokenInput:
    """Token ids, taken as they are."""

    ids: Sequence[int]

    def __post_init__(self) -> None:
        ids = check_sequence("ids", self.ids)
        if not ids:
            raise FieldError("ids", "must not be empty")
        store(self, "ids", tuple(check_integer(f"ids[{index}]", id) for index, id in enumerate(ids)))


ModelInput: TypeAlias = str | ChatInput | TokenInput
"""Text, which gets the tokenizer's usual special tokens; a conversation; or token ids."""
Input: TypeAlias = ModelInput | Sequence[ChatMessage | Mapping[str, str]] | Sequence[int]
"""What callers may write for it: also bare messages or dicts with role and content, and bare token ids."""


def model_input(value: Input, field: str = "input") -> ModelInput:
    """Reads what a caller wrote.

    Raises:
        FieldError: neither text, nor chat messages, nor token ids.
    """
    if isinstance(value, ChatInput | TokenInput):
        return value
    if isinstance(value, str):
        if not check_text(field, value):
            raise FieldError(field, "must not be empty")
        return value
    items = check_sequence(field, value)
    if not items:
        raise FieldError(field, "must not be empty")
    if isinstance(items[0], ChatMessage | Mapping):
        return ChatInput(tuple(_chat_message(f"{field}[{index}]", item) for index, item in enumerate(items)))
    return TokenInput(tuple(check_integer(f"{field}[{index}]", item) for index, item in enumerate(items)))


def _chat_message(field: str, item: object) -> ChatMessage:
    if isinstance(item, ChatMessage):
        return item
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
        raise FieldError(field, f"must be a ChatMessage or a dict with role and content, got {item!r}")
    try:
        return ChatMessage(item["role"], item["content"])
    except FieldError as err:
        raise err.within(field) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; None is the server's choice.

    Attributes:
        temperature: 0 is greedy.
        top_p: smallest set of tokens with at least this probability.
        top_k: most likely tokens kept; 0 is off.
        min_p: share of the likeliest token's probability that a token must have.
        repetition_penalty: above 0; 1 is off.
        seed: the same request with the same seed gives the same tokens.
        stop: strings where the text ends; they are not part of it.
        logprobs: also give log-probabilities of this many likeliest tokens; 0 gives the chosen token's alone.
        ignore_eos: go on after the end-of-sequence token.
        prompt_logprobs: log-probability of every prompt token given those before it.
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            store_integer(self, "max_new_tokens", least=1)
        if self.seed is not None:
            store_integer(self, "seed", MAX_UINT64)
        if self.logprobs is not None:
            store_integer(self, "logprobs", MAX_LOGPROBS)
        store_integer(self, "top_k")
        store(self, "temperature", check_number("temperature", self.temperature))
        if self.temperature != 0 and not 0.001 <= self.temperature <= 100:
            raise FieldError("temperature", f"must be 0 (greedy) or 0.001 to 100, got {self.temperature}")
        _store_share(self, "top_p", 1.0, is_above_0=True)
        _store_share(self, "min_p", 1.0)
        _store_share(self, "repetition_penalty", 100.0, is_above_0=True)
        store_texts(self, "stop")
        _check_stop(self.stop)
        check_bool("ignore_eos", self.ignore_eos)
        check_bool("prompt_logprobs", self.prompt_logprobs)


def _store_share(of: Sampling, field: str, most: float, *, is_above_0: bool = False) -> None:
    value = check_number(field, getattr(of, field))
    if not 0.0 <= value <= most or (is_above_0 and value == 0):
        least = "above 0" if is_above_0 else "at least 0"
        raise FieldError(field, f"must be {least} and at most {most:g}, got {value}")
    store(of, field, value)


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise FieldError("stop", f"at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
    for index, text in enumerate(stop):
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise FieldError(f"stop[{index}]", f"must have 1 to {MAX_STOP_CHARS} characters, got {len(text)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What Generate, GenerateStream and Compare ask for.

    Attributes:
        max_relative_edit: limit on ``|edit| / |x|`` per site and token.
        watch: features to read on every token without editing them.
        policies: that shall apply whether or not their target and rollout choose this request.
        conversation: what a rollout by conversation hashes.
        min_policy_activation: the oldest activation of policies that may decide; waited for until the deadline.
    """

    input: ModelInput
    sampling: Sampling = Sampling()
    interventions: Sequence[Intervention] = ()
    max_relative_edit: float | None = None
    watch: Sequence[FeatureRef] = ()
    triggers: Sequence[Trigger] = ()
    policies: Sequence[str] = ()
    conversation: str = ""
    min_policy_activation: int | None = None

    def __post_init__(self) -> None:
        _check_input(self.input)
        check_instance("sampling", self.sampling, Sampling, "a Sampling")
        store_several(self, "interventions", EDITS, "an edit such as Zero or Clamp")
        check_edited_once(self.interventions)
        if self.max_relative_edit is not None:
            store(self, "max_relative_edit", check_limit("max_relative_edit", self.max_relative_edit))
        store_several(self, "watch", FeatureRef, "a FeatureRef")
        store_several(self, "triggers", Trigger, "a Trigger")
        store_texts(self, "policies")
        _check_distinct("watch", self.watch, "a feature is named twice")
        _check_distinct("triggers", [trigger.name for trigger in self.triggers], "a name is given twice")
        _check_distinct("policies", self.policies, "a policy is named twice")
        if len(check_text("conversation", self.conversation)) > MAX_CONVERSATION_CHARS:
            length = len(self.conversation)
            raise FieldError("conversation", f"at most {MAX_CONVERSATION_CHARS} characters, got {length}")
        if self.min_policy_activation is not None:
            store_integer(self, "min_policy_activation", MAX_UINT64)


@dataclass(frozen=True, slots=True)
class TopKSelection:
    """The ``k`` largest activations of each token; by magnitude where features can be negative."""

    k: int

    def __post_init__(self) -> None:
        store(self, "k", check_integer("top_k", self.k, least=1))


@dataclass(frozen=True, slots=True)
class ThresholdSelection:
    """Every activation above ``value``; likewise."""

    value: float

    def __post_init__(self) -> None:
        store(self, "value", check_number("threshold", self.value))
        if not 0.0 <= self.value <= FLOAT32_MAX:
            raise FieldError("threshold", f"must be finite and at least 0, got {self.value}")


@dataclass(frozen=True, slots=True)
class FeatureSelection:
    """Just these features, zeros included."""

    features: Sequence[FeatureRef]

    def __post_init__(self) -> None:
        store_several(self, "features", FeatureRef, "a FeatureRef")
        if not self.features:
            raise FieldError("features", "must not be empty")
        _check_distinct("features", self.features, "a feature is named twice")


Selection: TypeAlias = TopKSelection | ThresholdSelection | FeatureSelection


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRequest:
    """What GetActivations asks for: every input under every SAE, read under these edits."""

    inputs: Sequence[ModelInput]
    saes: Sequence[str] = ()
    selection: Selection
    interventions: Sequence[Intervention] = ()

    def __post_init__(self) -> None:
        store(self, "inputs", check_sequence("inputs", self.inputs))
        if not self.inputs:
            raise FieldError("inputs", "must not be empty")
        for index, input in enumerate(self.inputs):
            _check_input(input, f"inputs[{index}].")
        check_instance(
            "selection", self.selection, Selection, "a TopKSelection, ThresholdSelection or FeatureSelection"
        )
        store_texts(self, "saes")
        if "" in self.saes:
            raise FieldError(f"saes[{self.saes.index('')}]", "must not be empty")
        if not self.saes and not isinstance(self.selection, FeatureSelection):
            raise FieldError("saes", "must not be empty unless features are named")
        _check_distinct("saes", self.saes, "an SAE is named twice")
        store_several(self, "interventions", EDITS, "an edit such as Zero or Clamp")
        check_edited_once(self.interventions)


def _check_input(input: ModelInput, path: str = "") -> None:
    check_instance(f"{path}input", input, ModelInput, "text, a ChatInput or a TokenInput")
    if isinstance(input, str) and not check_text(f"{path}text", input):
        raise FieldError(f"{path}text", "must not be empty")


def _check_distinct(field: str, values: Sequence[object], problem: str) -> None:
    if len(set(values)) != len(values):
        raise FieldError(field, problem)
