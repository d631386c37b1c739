"""One RPC from the inside: its id and its deadline, for whoever handles it."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING

from saeguard_server.caller import NOBODY, Caller
from saeguard_server.request import Call

if TYPE_CHECKING:
    from saeguard_server.edge.types import Context

REQUEST_ID_KEY = "x-request-id"
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

_CURRENT: ContextVar[Call] = ContextVar("call")


def current() -> Call:
    """The RPC that the running handler serves."""
    return _CURRENT.get()


def enter(context: Context, max_deadline_s: float) -> Call:
    """Begins a call: the request id where it is sane, and the deadline where it is not too far. Nobody calls yet."""
    left = context.time_remaining()
    deadline = time.monotonic() + min(inf if left is None else left, max_deadline_s)
    call = Call(_request_id(context), deadline, NOBODY)
    _CURRENT.set(call)
    return call


def identified(call: Call, caller: Caller) -> Call:
    """The same call once it is known who calls."""
    call = replace(call, caller=caller)
    _CURRENT.set(call)
    return call


def _request_id(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _SANE_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex
