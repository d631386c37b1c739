"""What happens when a condition holds for the first time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias, get_args

from saeguard_client import _checks
from saeguard_client.conditions import Condition
from saeguard_client.interventions import Intervention


@dataclass(frozen=True, slots=True)
class Flag:
    """Only count that it fired."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the generation: the token that fired, and anything after it, is never sent.

    Requests with a Stop get each token one step later than others.
    """


@dataclass(frozen=True, slots=True)
class Apply:
    """Make these edits from the token that fired on; they have no ``when`` of their own."""

    interventions: Iterable[Intervention]

    def __post_init__(self) -> None:
        object.__setattr__(self, "interventions", tuple(self.interventions))


Action: TypeAlias = Flag | Stop | Apply
ACTIONS: Final = get_args(Action)


@dataclass(frozen=True, slots=True)
class Trigger:
    """A condition and what it does, by a name that receipts use; names are unique in a request."""

    name: str
    when: Condition
    action: Action = Flag()

    def __post_init__(self) -> None:
        _checks.text("name", self.name)
        if not isinstance(self.when, Condition):
            raise ValueError(f"when: must be a Condition, got {self.when!r}")
        if not isinstance(self.action, ACTIONS):
            raise ValueError(f"action: must be Flag(), Stop() or Apply([...]), got {self.action!r}")
