"""What the fake engine serves, as policies see it, with conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from saeguard_server.flows.serving import ServedModel
from saeguard_server.guard.policy.model import Activation, Policy, Revision
from saeguard_server.guard.policy.snapshot import Snapshot, build
from support.policy_shapes import NOW


@pytest.fixture
def served(engine: Any) -> ServedModel:
    engine.capabilities = replace(engine.capabilities, conditions=True)
    return ServedModel(engine)


@pytest.fixture
def in_force(served: ServedModel) -> Callable[..., Snapshot]:
    """A snapshot of some policies."""

    def make(*policies: Policy, number: int = 3) -> Snapshot:
        revision = Revision(number=number + 4, policies=policies, author="ada", time=NOW, reason="test")
        activation = Activation(number=number, revision=revision.number, actor="ada", time=NOW, reason="test")
        return build(activation, revision, served, NOW)

    return make
