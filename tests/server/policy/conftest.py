"""What the fake engine serves, as policies see it, with conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from saeguard.catalog import Activation
from saeguard_server.policy.model import Policy, PolicyRevision
from saeguard_server.policy.snapshot import Snapshot, build_snapshot
from support.policy_shapes import NOW


@pytest.fixture
def served(engine: Any) -> Any:
    engine.capabilities = replace(engine.capabilities, conditions=True)
    return engine


@pytest.fixture
def in_force(served: Any) -> Callable[..., Snapshot]:
    """A snapshot of some policies."""

    def make(*policies: Policy, number: int = 3, keeps_audit: bool = False) -> Snapshot:
        revision = PolicyRevision(number=number + 4, policies=policies, author="ada", time=NOW, reason="test")
        activation = Activation(number=number, revision=revision.number, actor="ada", time=NOW, reason="test")
        return build_snapshot(activation, revision, served, NOW, keeps_audit=keeps_audit)

    return make
