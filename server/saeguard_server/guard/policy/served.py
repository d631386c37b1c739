"""What policies are checked against and prepared for, as the flows know it; here, so that the guard needs no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from saeguard_sae.edits import Affine
from saeguard_sae.loading import LoadedSae
from saeguard_server.interventions import FeatureRef, Wanted, WantedTrigger


class EditPart(Protocol):
    """An edit ready to be made; all that is open are a request's positions."""

    @property
    def affine(self) -> Affine:
        """What is done to the feature, in raw units."""
        ...


class TriggerPart(Protocol):
    """A trigger ready to be decided."""

    @property
    def edits(self) -> Sequence[EditPart]:
        """What it applies, in the order of its interventions."""
        ...


class Served(Protocol):
    """One model with its SAEs and its engine."""

    @property
    def model_name(self) -> str: ...

    @property
    def model_digest(self) -> str: ...

    @property
    def max_context(self) -> int:
        """Tokens that one request may hold."""
        ...

    @property
    def keeps_audit(self) -> bool:
        """Whether there is an audit for ``requires_audit``."""
        ...

    @property
    def compares(self) -> bool:
        """Whether requests can also be run without a policy, for ``counterfactual_share``."""
        ...

    def sae(self, name: str, field: str) -> LoadedSae:
        """The SAE of that name.

        Raises:
            UnknownName: there is none.
        """
        ...

    def feature(self, ref: FeatureRef, field: str) -> LoadedSae:
        """The SAE of a feature that it has.

        Raises:
            UnknownName, InvalidRequest: there is none.
        """
        ...

    def edit(self, wanted: Wanted) -> EditPart:
        """An edit as the engine can make it.

        Raises:
            UnknownName, InvalidRequest: the field that cannot be applied as it stands.
        """
        ...

    def trigger(self, wanted: WantedTrigger) -> TriggerPart:
        """A trigger as the engine can decide it.

        Raises:
            UnknownName, InvalidRequest: the field that cannot be decided or applied as it stands.
        """
        ...
