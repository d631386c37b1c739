"""The model's tokenizer as the server uses it: prompts to ids, ids to text as they come, tokens with their offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from saeguard.requests import ChatInput, ModelInput


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A prompt as ids, with each token's offset in the text it was made from (None for ids and added tokens)."""

    ids: tuple[int, ...]
    offsets: tuple[int | None, ...]


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
        self.special_ids = frozenset(int(one) for one in fast.all_special_ids)
        self.has_chat_template = bool(fast.chat_template)

    def encode(self, prompt: ModelInput) -> EncodedText:
        """The ids the model will read.

        Raises:
            ValueError: the message begins with the field of the prompt that is wrong.
        """
        if isinstance(prompt, str):
            return self._encode(prompt, add_special_tokens=True, field="text")
        if isinstance(prompt, ChatInput):
            return self._encode(self._layout(prompt), add_special_tokens=False, field="chat")
        for index, one in enumerate(prompt.ids):
            if not 0 <= one < self.vocab_size:
                raise ValueError(f"tokens.ids[{index}]: must be 0 to {self.vocab_size - 1}, got {one}")
        return EncodedText(tuple(prompt.ids), (None,) * len(prompt.ids))

    def text(self, token: int) -> str:
        """The text of one token, spaces included; a part of a character shows as the replacement character."""
        return str(self._backend.decode([token], skip_special_tokens=False))

    def stream(self) -> TextStream:
        """A decoder for one request's generated tokens."""
        return TextStream(self._backend)

    def _layout(self, prompt: ChatInput) -> str:
        if not self.has_chat_template:
            raise ValueError("chat: this model's tokenizer has no chat template; send text")
        messages = [{"role": one.role, "content": one.content} for one in prompt.messages]
        try:
            return str(self._fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as err:  # templates are programs, and raise what they like
            raise ValueError(f"chat: the chat template refuses these messages: {err}") from err

    def _encode(self, text: str, *, add_special_tokens: bool, field: str) -> EncodedText:
        found = self._backend.encode(text, add_special_tokens=add_special_tokens)
        if not found.ids:
            raise ValueError(f"{field}: gives no tokens")
        return EncodedText(tuple(found.ids), tuple(start if end > start else None for start, end in found.offsets))


class TextStream:
    """Generated tokens to text, piece by piece; special tokens have no text."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that became certain with these tokens; empty while a character is incomplete."""
        return "".join(self._stream.step(self._backend, token) or "" for token in tokens)


# Generated tokens to the text a caller sees: stop strings are found across tokens and never shown.


class TokenDecoder(Protocol):
    """Tokens to text, piece by piece."""

    def push(self, tokens: Sequence[int]) -> str: ...


class Assembler:
    """The text of one request. What could still become a stop string is held back until it is decided."""

    def __init__(self, decoder: TokenDecoder, stops: Sequence[str]) -> None:
        self._decoder, self._stops = decoder, stops
        self._held = ""
        self.stopped_by = ""
        """The stop string that ended the text; empty while none did."""

    def push(self, token: int) -> str:
        """The text that is certain with this token; ``stopped_by`` is set when it completed a stop string."""
        self._held += self._decoder.push((token,))
        found = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            at, self.stopped_by = min(found)
            text, self._held = self._held[:at], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """What was held back when the generation ended otherwise."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
