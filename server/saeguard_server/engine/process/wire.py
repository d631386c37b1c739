"""Messages as bytes on a socket pair.

Pickle is safe here and nowhere else: the pair is made before the child, has no name, and only these two processes of
the same code hold its ends. Whoever could write to it could write to their memory.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable
from dataclasses import fields
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

from saeguard_server.reply import ActivationPart, Chunk, FeatureReading, Token, TokenLogprob, TokenText

_PROTOCOL = 5
_EACH_STEP = (ActivationPart, Chunk, FeatureReading, Token, TokenLogprob, TokenText)


def _by_fields(kind: type[Any]) -> Callable[[Any], tuple[type[Any], tuple[Any, ...]]]:
    """Reduces a dataclass to its class and its values: a third of what it takes through its own state."""
    values = attrgetter(*(field.name for field in fields(kind)))
    return lambda one: (kind, values(one))


class _Pickler(pickle.Pickler):
    dispatch_table = copyreg.dispatch_table | {kind: _by_fields(kind) for kind in _EACH_STEP}


def dumps(message: object) -> bytes:
    """The message as bytes."""
    buffer = io.BytesIO()
    _Pickler(buffer, _PROTOCOL).dump(message)
    return buffer.getvalue()


def send(connection: Connection, message: object) -> None:
    """Sends one message, waiting until the other side has room for it.

    Raises:
        OSError: the other side is gone.
    """
    connection.send_bytes(dumps(message))


def receive(connection: Connection) -> Any:
    """The next message, waiting for it.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    return pickle.loads(connection.recv_bytes())
