"""What a request reads: text, a conversation, or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from saeguard_client import _checks


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; the server lays it out with the tokenizer's chat template.

    Attributes:
        role: "system", "user" or "assistant".
        content: what was said.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        _checks.text("role", self.role)
        _checks.text("content", self.content)

    @classmethod
    def of(cls, message: object) -> ChatMessage:
        """From a message or a mapping with exactly ``role`` and ``content``.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(message, ChatMessage):
            return message
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(f"must be a ChatMessage or a dict with role and content, got {message!r}")
        return cls(message["role"], message["content"])


Input: TypeAlias = str | Sequence[ChatMessage | Mapping[str, str]] | Sequence[int]
"""Text, which gets the tokenizer's usual special tokens; a conversation; or token ids, taken as they are."""
