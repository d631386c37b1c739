"""Prompts to token ids, refused by field."""

from __future__ import annotations

from saeguard_server.engine.tokenizer import Encoded, Tokenizer
from saeguard_server.errors import InvalidRequest
from saeguard_server.request import ChatInput, ModelInput, TextInput


def encode(tokenizer: Tokenizer, prompt: ModelInput, prefix: str = "") -> Encoded:
    """The prompt's tokens. ``prefix`` is the field that holds the prompt, with its dot.

    Raises:
        InvalidRequest: no tokens, an id outside the vocabulary, no chat template.
    """
    try:
        return tokenizer.encode(prompt)
    except ValueError as err:
        field, _, what = str(err).partition(": ")
        raise InvalidRequest(f"{prefix}{field}", what) from err


def check_length(prompt: ModelInput, tokens: int, most: int, prefix: str = "") -> None:
    """Refuses a prompt that does not fit the context.

    Raises:
        InvalidRequest: more than ``most`` tokens.
    """
    if tokens > most:
        name = "text" if isinstance(prompt, TextInput) else "chat" if isinstance(prompt, ChatInput) else "tokens"
        raise InvalidRequest(f"{prefix}{name}", f"has {tokens} tokens, at most {most} fit")
