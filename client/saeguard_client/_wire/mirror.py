"""Reads a message into the dataclass of the same fields, by name, so that no field is copied by hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError, Message

from saeguard_client import activations, catalog, results
from saeguard_client.errors import malformed

T = TypeVar("T")
M = TypeVar("M", bound=Message)

MIRRORS: Final[dict[str, type]] = {
    "FeatureReading": results.FeatureReading,
    "InterventionReceipt": results.InterventionReceipt,
    "PolicyFacts": results.PolicyFacts,
    "Receipt": results.Receipt,
    "StoppedBy": results.StoppedBy,
    "Timings": results.Timings,
    "Token": results.Token,
    "TokenLogprob": results.TokenLogprob,
    "TriggerReceipt": results.TriggerReceipt,
    "Usage": results.Usage,
    "Feature": catalog.Feature,
    "FeatureExample": catalog.FeatureExample,
    "GetModelResponse": catalog.Model,
    "GetServerInfoResponse": catalog.ServerInfo,
    "Limits": catalog.Limits,
    "PromotedToken": catalog.PromotedToken,
    "Quantile": catalog.Quantile,
    "Sae": catalog.Sae,
    "SaeConvention": catalog.SaeConvention,
    "SaeQuality": catalog.SaeQuality,
    "TokenText": activations.TokenText,
}
"""Message name to dataclass; the fields are the same, which a test compares."""


def decode(cls: type[M], data: bytes) -> M:
    """Raises InternalError where ``data`` is not such a message."""
    try:
        return cls.FromString(data)
    except DecodeError as err:
        raise malformed(f"not a {cls.DESCRIPTOR.name}") from err


def read(cls: type[T], message: Message) -> T:
    """The mirror of ``message``."""
    return cls(**values(cls, message))


def values(cls: type, message: Message) -> Mapping[str, Any]:
    """The fields that ``cls`` and ``message`` share."""
    known = message.DESCRIPTOR.fields_by_name
    return {name: _value(message, known[name], optional) for name, optional in _fields(cls) if name in known}


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, bool], ...]:
    """(name, whether the dataclass takes None for it)."""
    return tuple((field.name, field.default is None) for field in fields(cls))


def _value(message: Message, field: Any, optional: bool) -> Any:
    if optional and not message.HasField(field.name):
        return None
    value = getattr(message, field.name)
    if field.is_repeated:
        return tuple(_one(field, item) for item in value)
    return _one(field, value)


def _one(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return read(MIRRORS[field.message_type.name], value)
    return value if field.enum_type is None else _enum(field, value)


def _enum(field: Any, number: int) -> str:
    """``FINISH_REASON_STOP`` is "stop"; a number from a newer server is spelled out, not dropped."""
    known = field.enum_type.values_by_number.get(number)
    if known is None:
        return f"{field.name}_{number}"
    return str(known.name).removeprefix(f"{field.name.upper()}_").lower()
