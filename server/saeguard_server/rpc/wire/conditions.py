"""Conditions on features, and the triggers that act on them."""

from __future__ import annotations

from collections.abc import Sequence

from saeguard.v1 import condition_pb2 as pb
from saeguard_server.errors import InvalidRequest
from saeguard_server.interventions import Action, Apply, Flag, Stop, Trigger
from saeguard_server.rpc.wire.fields import at, at_most, chosen
from saeguard_server.rpc.wire.interventions import condition, interventions


def triggers(messages: Sequence[pb.Trigger], limit: int, edits: int) -> tuple[Trigger, ...]:
    """The triggers of a request.

    Args:
        edits: at most so many in one ``apply``.

    Raises:
        InvalidRequest: more than ``limit``, or one is malformed; ``triggers[i]...`` is named.
    """
    at_most(limit, messages, "triggers")
    return tuple(_trigger(trigger, f"triggers[{index}]", edits) for index, trigger in enumerate(messages))


def _trigger(message: pb.Trigger, path: str, edits: int) -> Trigger:
    if not message.HasField("when"):
        raise InvalidRequest(f"{path}.when", "must be set")
    when = condition(message.when, f"{path}.when")
    action = _action(message, path, edits)
    with at(path):
        return Trigger(message.name, when, action)


def _action(message: pb.Trigger, path: str, edits: int) -> Action:
    match chosen(message, "action", f"{path}.action"):
        case "flag":
            return Flag()
        case "stop":
            return Stop()
    with at(f"{path}.apply"):
        return Apply(interventions(message.apply.interventions, edits, f"{path}.apply.interventions"))
