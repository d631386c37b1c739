"""What is served, as policies see it, and their part of a request as the engine takes it."""

from __future__ import annotations

from collections.abc import Sequence

from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.protocol import Engine
from saeguard_server.flows.served import find_feature, find_sae
from saeguard_server.flows.steering import PreparedEdit, PreparedTrigger, prepare_edit, prepare_trigger
from saeguard_server.guard.policy.served import EditPart, TriggerPart
from saeguard_server.interventions import FeatureRef, Wanted, WantedTrigger


class ServedModel:
    """A ``guard.policy.served.Served``: one engine's model and SAEs."""

    def __init__(self, engine: Engine, *, keeps_audit: bool = False) -> None:
        self._engine, self._keeps_audit = engine, keeps_audit

    @property
    def keeps_audit(self) -> bool:
        """Whether requests can be recorded."""
        return self._keeps_audit

    @property
    def compares(self) -> bool:
        """Whether it can be measured what a policy changes."""
        return self._engine.capabilities.compares

    @property
    def model_name(self) -> str:
        """What policies aim at."""
        return self._engine.model.name

    @property
    def model_digest(self) -> str:
        """What policies pin."""
        return self._engine.model.digest

    @property
    def max_context(self) -> int:
        """What positions in policies are compared with."""
        return self._engine.model.max_context

    def sae(self, name: str, field: str) -> LoadedSae:
        """The SAE of that name; raises UnknownName."""
        return find_sae(self._engine, name, field)

    def feature(self, ref: FeatureRef, field: str) -> LoadedSae:
        """The SAE of a feature that it has; raises UnknownName, InvalidRequest."""
        return find_feature(self._engine, ref, field)

    def edit(self, wanted: Wanted) -> PreparedEdit:
        """An edit as the engine can make it; raises UnknownName, InvalidRequest."""
        return prepare_edit(self._engine, wanted)

    def trigger(self, wanted: WantedTrigger) -> PreparedTrigger:
        """A trigger as the engine can decide it; raises UnknownName, InvalidRequest."""
        return prepare_trigger(self._engine, wanted)


def prepared(
    edits: Sequence[EditPart], triggers: Sequence[TriggerPart]
) -> tuple[list[PreparedEdit], list[PreparedTrigger]]:
    """What a resolution holds, as ``ServedModel`` made it."""
    return [_edit(one) for one in edits], [_trigger(one) for one in triggers]


def _edit(part: EditPart) -> PreparedEdit:
    assert isinstance(part, PreparedEdit), "made by ServedModel.edit"
    return part


def _trigger(part: TriggerPart) -> PreparedTrigger:
    assert isinstance(part, PreparedTrigger), "made by ServedModel.trigger"
    return part
