"""A server as far as policies go, in a process of its own: follows a store, and says on stdout what it enforces when.

Lines of JSON: ``activation`` with the ``revision`` and ``at`` when it is enforced from, ``is_serving`` whenever that
changes. Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any, cast

import torch
from prometheus_client import CollectorRegistry

from saeguard.catalog import Model
from saeguard.types import KINDS
from saeguard_sae.catalogue import Catalogue
from saeguard_sae.dictionary import Dictionary, ReLU
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Site
from saeguard_server.engine.protocol import Capabilities
from saeguard_server.errors import PoliciesUnavailable
from saeguard_server.observe import Metrics
from saeguard_server.policy import snapshot
from saeguard_server.policy.snapshot import PoliciesInForce, Snapshot
from saeguard_server.policy.store import open_store
from saeguard_server.policy.store.protocol import Active
from saeguard_server.policy.sync import PolicySync

LAYERS = (1, 2)
D_MODEL, D_SAE = 16, 64
WATCH_S = 0.02


class Engine:
    """What of an engine policies are prepared for: two layers with an SAE each."""

    model = Model("bench", "none", "digest", 4, D_MODEL, 128, 64, "float32", False)
    capabilities = Capabilities("bench", frozenset(Site(n, "resid_post") for n in LAYERS), frozenset(KINDS))

    def __init__(self) -> None:
        self.saes = {f"layer{n}": self._sae(n) for n in LAYERS}

    @staticmethod
    def _sae(layer: int) -> LoadedSae:
        weights = torch.ones(D_MODEL, D_SAE), torch.zeros(D_SAE), torch.ones(D_SAE, D_MODEL), torch.zeros(D_MODEL)
        return LoadedSae(
            f"layer{layer}", Site(layer, "resid_post"), Dictionary(*weights, ReLU()), "digest", Catalogue()
        )


def say(**line: object) -> None:
    os.write(1, f"{json.dumps(line | {'at': time.monotonic()})}\n".encode())


async def follow(url: str, poll_s: float, stale_after_s: float) -> None:
    """Until its process is ended."""
    served = cast(Any, Engine())
    policies = PoliciesInForce(stale_after_s)

    def build(active: Active) -> Snapshot:
        return snapshot.build_snapshot(active.activation, active.revision, served, datetime.now(UTC))

    store = await open_store(url)
    async with PolicySync(store, policies, build, Metrics(CollectorRegistry()), poll_s=poll_s).running():
        await asyncio.gather(_say_activations(policies), _say_whether_serving(policies))


async def _say_activations(policies: PoliciesInForce) -> None:
    known = -1
    while True:
        try:
            found = await policies.at_least(known + 1, time.monotonic() + 3600.0)
        except PoliciesUnavailable:
            await asyncio.sleep(WATCH_S)
            continue
        known = found.activation.number
        say(activation=known, revision=found.revision.number)


async def _say_whether_serving(policies: PoliciesInForce) -> None:
    last: bool | None = None
    while True:
        if policies.is_current() is not last:
            last = policies.is_current()
            say(is_serving=last)
        await asyncio.sleep(WATCH_S)


if __name__ == "__main__":
    asyncio.run(follow(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
