"""The model's tokenizer as the server uses it: prompts to ids, ids to text as they come, tokens with their offsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from saeguard.checks import FieldError
from saeguard.requests import ChatInput, ModelInput
from saeguard_sae.models import special_ids
from saeguard_server.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A prompt as ids, with each token's offset in the text it was made from (None for ids and added tokens)."""

    ids: tuple[int, ...]
    offsets: tuple[int | None, ...]
    assistant_turns: tuple[tuple[int, int], ...] = ()
    """Of a chat: the tokens ``[first, last)`` of each assistant message's content, in order."""


class Tokenizer:
    """A fast Hugging Face tokenizer.

    Args:
        fast: the tokenizer; slow ones have no offsets and no incremental decoding.
        vocab_size: rows of the model's embedding: ids at or above it cannot be read.
    """

    def __init__(self, fast: PreTrainedTokenizerFast, vocab_size: int) -> None:
        self._fast = fast
        # The backend alone is safe to use from several threads; the wrapper sets truncation on every call.
        self._backend = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = vocab_size
        self.special_ids = special_ids(fast)
        self.has_chat_template = bool(fast.chat_template)

    def encode(self, prompt: ModelInput) -> EncodedText:
        """The ids the model will read; raises FieldError, which names the field."""
        if isinstance(prompt, str):
            return self._encode(prompt, add_special_tokens=True, field="text")
        if isinstance(prompt, ChatInput):
            return self._encode(self._layout(prompt), add_special_tokens=False, field="chat")
        for index, token in enumerate(prompt.ids):
            if not 0 <= token < self.vocab_size:
                raise FieldError(f"tokens.ids[{index}]", f"must be 0 to {self.vocab_size - 1}, got {token}")
        return EncodedText(tuple(prompt.ids), (None,) * len(prompt.ids))

    def text(self, token: int) -> str:
        """The text of one token, spaces included; a part of a character shows as the replacement character."""
        return str(self._backend.decode([token], skip_special_tokens=False))

    def detokenizer(self, stops: Sequence[str]) -> Detokenizer:
        """For one request's generated tokens; special ones have no text."""
        stream = DecodeStream(skip_special_tokens=True)
        return Detokenizer(lambda token: stream.step(self._backend, token) or "", stops)

    def _layout(self, prompt: ChatInput) -> str:
        if not self.has_chat_template:
            raise FieldError("chat", "this model's tokenizer has no chat template; send text")
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        try:
            return str(self._fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as err:  # templates are programs, and raise what they like
            raise FieldError("chat", f"the chat template refuses these messages: {err}") from err

    def _encode(self, text: str, *, add_special_tokens: bool, field: str) -> EncodedText:
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        if not encoding.ids:
            raise FieldError(field, "gives no tokens")
        return EncodedText(
            tuple(encoding.ids), tuple(start if end > start else None for start, end in encoding.offsets)
        )


def encode_input(tokenizer: Tokenizer, input: ModelInput, most: int, prefix: str = "") -> EncodedText:
    """The ids of an input of at most so many tokens, in the field ``prefix``, dot included; raises InvalidRequest."""
    try:
        encoded = tokenizer.encode(input)
    except FieldError as err:
        raise InvalidRequest(f"{prefix}{err.field}", err.problem) from err
    if len(encoded.ids) > most:
        name = "text" if isinstance(input, str) else "chat" if isinstance(input, ChatInput) else "tokens"
        raise InvalidRequest(f"{prefix}{name}", f"has {len(encoded.ids)} tokens, at most {most} fit")
    return encoded


class Detokenizer:
    """The text of one generation. What could still become a stop string waits until it is decided."""

    def __init__(self, decode: Callable[[int], str], stops: Sequence[str]) -> None:
        self._decode, self._stops = decode, stops
        self._waiting = ""
        self.stopped_by = ""
        """The stop string that ended the text; empty while none did."""

    def push(self, token: int) -> str:
        """The text that is certain with this token; ``stopped_by`` is set when it completed a stop string."""
        text = self._waiting + self._decode(token)
        matches = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if matches:
            cut, self.stopped_by = min(matches)
            self._waiting = ""
        else:
            cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            self._waiting = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What still waits when the generation has ended otherwise."""
        text, self._waiting = self._waiting, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
