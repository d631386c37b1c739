"""Which tokens a model will read for one request, and whether a scope holds any of them."""

from __future__ import annotations

from dataclasses import dataclass

from saeguard_sae.edit_table import FOREVER
from saeguard_server.errors import InvalidRequest
from saeguard_server.interventions import Scope


@dataclass(frozen=True, slots=True)
class Reach:
    """The prompt, and how many ``tokens`` the model reads at most, prompt included."""

    prompt: tuple[int, ...]
    tokens: int
    special_ids: frozenset[int]

    def place(self, scope: Scope) -> tuple[int, int]:
        """``[first, last)`` position that the scope selects."""
        first, last = scope.positions(len(self.prompt))
        return first, FOREVER if last is None else last

    def check(self, scope: Scope, field: str) -> None:
        """Refuses a scope that holds no token the model will read: what it limits would silently never be done.

        Raises:
            InvalidRequest: it holds none.
        """
        first, last = self.place(scope)
        end = min(last, self.tokens)
        is_only_special = (
            not scope.include_special_tokens
            and end <= len(self.prompt)
            and all(token in self.special_ids for token in self.prompt[first:end])
        )
        if first >= end or is_only_special:
            read = f"positions 0 to {self.tokens - 1}, {len(self.prompt)} of them prompt"
            raise InvalidRequest(field, f"selects no token: the model reads {read}")
