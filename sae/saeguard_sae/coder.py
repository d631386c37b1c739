"""What is served under the name of an SAE: a dictionary, or one of the two that are more than one matrix product."""

from __future__ import annotations

from typing import TypeAlias

from saeguard_sae.dictionary import Dictionary
from saeguard_sae.pursuit import MatchingPursuit
from saeguard_sae.selections import AbsTopK, TopK
from saeguard_sae.temporal import Temporal

SparseCoder: TypeAlias = Dictionary | MatchingPursuit | Temporal


def is_signed(coder: SparseCoder) -> bool:
    """Whether a feature can be on with a negative value."""
    if not isinstance(coder, Dictionary):
        return False
    activation = coder.activation
    return isinstance(activation, AbsTopK) or (isinstance(activation, TopK) and activation.keeps_negative)


def why_not_editable(coder: SparseCoder) -> str | None:
    """Why its features cannot be edited exactly while text is generated; None when they can."""
    if isinstance(coder, Temporal):
        return "its features depend on the whole prefix, so that an edit would change what every later token means"
    return None
