"""Where in a message something is wrong, and the checks that every request shares."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import TypeVar

from google.protobuf.message import Message

from saeguard_server.errors import InvalidRequest

T = TypeVar("T")

_FIELD = re.compile(r"[a-z_]+(\[\d+\])?(\.[a-z_]+(\[\d+\])?)*")


@contextmanager
def at(path: str) -> Iterator[None]:
    """Turns a domain class's ``ValueError("field: problem")`` into a refusal of ``path.field``.

    Raises:
        InvalidRequest: in place of the ValueError.
    """
    try:
        yield
    except ValueError as err:
        field, _, problem = str(err).partition(": ")
        if problem and _FIELD.fullmatch(field):
            raise InvalidRequest(f"{path}.{field}".lstrip("."), problem) from err
        raise InvalidRequest(path, str(err)) from err


def chosen(message: Message, oneof: str, path: str) -> str:
    """The field of ``oneof`` that is set.

    Raises:
        InvalidRequest: none is.
    """
    name: str | None = message.WhichOneof(oneof)
    if name is None:
        names = [field.name for field in message.DESCRIPTOR.oneofs_by_name[oneof].fields]
        raise InvalidRequest(path, f"must be set to one of {', '.join(names)}")
    return name


def at_most(limit: int, items: Sized, path: str) -> None:
    """Refuses what is too long before any of it is looked at.

    Raises:
        InvalidRequest: more than ``limit`` items.
    """
    if len(items) > limit:
        raise InvalidRequest(path, f"at most {limit}, got {len(items)}")


def named(names: Mapping[int, T], number: int, path: str) -> T:
    """What an enum's number stands for.

    Raises:
        InvalidRequest: the number is not known here.
    """
    if number not in names:
        raise InvalidRequest(path, f"{number} is not a value of this enum; this server may be older than its caller")
    return names[number]
