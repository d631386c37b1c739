"""What the model reads: text, a conversation, or token ids."""

from __future__ import annotations

from typing import TypeAlias

from saeguard.v1 import activation_service_pb2 as activation_pb
from saeguard.v1 import generation_service_pb2 as generation_pb
from saeguard.v1 import input_pb2 as pb
from saeguard_server.errors import InvalidRequest
from saeguard_server.request import ChatInput, ChatMessage, ModelInput, TextInput, TokenInput
from saeguard_server.rpc.wire.fields import at, chosen

HasInput: TypeAlias = generation_pb.GenerateRequest | activation_pb.ActivationInput
"""Messages with the same ``oneof input``; a test holds them together."""


def model_input(message: HasInput, path: str = "") -> ModelInput:
    """The input of a message at ``path``, "" for the request itself.

    Raises:
        InvalidRequest: none is set, it is empty, or a role is unknown.
    """
    prefix = f"{path}." if path else ""
    kind = chosen(message, "input", f"{prefix}input")
    if kind == "chat":
        return _chat(message.chat, f"{prefix}chat")
    if kind == "tokens":
        with at(f"{prefix}tokens"):
            return TokenInput(tuple(message.tokens.ids))
    if not message.text:
        raise InvalidRequest(f"{prefix}text", "must not be empty")
    return TextInput(message.text)


def _chat(message: pb.ChatInput, path: str) -> ChatInput:
    messages = []
    for index, one in enumerate(message.messages):
        with at(f"{path}.messages[{index}]"):
            messages.append(ChatMessage(one.role, one.content))
    with at(path):
        return ChatInput(tuple(messages))
