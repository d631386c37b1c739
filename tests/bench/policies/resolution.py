"""How long a request waits for its policies to be worked out, with 100 enforced rules over 40 features at two layers.

    cd tests && ../.venv/bin/python -m bench.policies.resolution

Prints a JSON line for each kind of request: the median and the 99th percentile in microseconds, of ``resolve`` alone
and with ``steer``, which places the edits on the request's tokens and hashes them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import torch

from bench.report import say
from saeguard.catalog import Activation
from saeguard.requests import GenerateRequest
from saeguard.types import KINDS, Cap, Intervention, Scale
from saeguard_sae.catalogue import Catalogue, CatalogueFeature
from saeguard_sae.dictionary import Dictionary, ReLU
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Site
from saeguard_server.caller import Caller, Role
from saeguard_server.engine.protocol import Capabilities
from saeguard_server.policy.model import Policy, PolicyLimits, PolicyRevision, Rollout, Rule, Target
from saeguard_server.policy.resolve import resolve_policies
from saeguard_server.policy.snapshot import Snapshot, build_snapshot
from saeguard_server.steering import TokenRange, steer

NOW = datetime.now(UTC)
SITES = (Site(3, "resid_post"), Site(8, "resid_post"))
FEATURES = 20
"""At each of the two."""
POLICIES, RULES = 5, 20
ROUNDS = 2000
TARGET_US = 200.0
EVERYBODY = Rollout()
CALLER = Caller("bot", frozenset({Role.GENERATE, Role.STEER}), tags=frozenset({"public"}))


def engine() -> Any:
    """What resolution asks of one."""
    saes = {}
    for site in SITES:
        shape = torch.randn(8, 64)
        dictionary = Dictionary(shape, torch.zeros(64), shape.T.contiguous(), torch.zeros(8), ReLU())
        known = {index: CatalogueFeature(index=index, label="x", maximum=4.0) for index in range(64)}
        saes[f"sae-{site.layer}"] = LoadedSae(f"sae-{site.layer}", site, dictionary, "d", Catalogue(features=known))
    model = SimpleNamespace(name="model", digest="digest")
    capabilities = Capabilities("bench", frozenset(SITES), frozenset(KINDS), conditions=True)
    return SimpleNamespace(saes=saes, model=model, capabilities=capabilities)


def policies(rollout: Rollout = EVERYBODY) -> tuple[Policy, ...]:
    """100 caps, in units of features' maxima: 40 features, each with two or three of them."""
    edits = [Cap(f"sae-{site.layer}", index, 1.0, unit="max") for site in SITES for index in range(FEATURES)]
    return tuple(
        Policy(
            name=f"policy-{number}",
            mode="enforce",
            target=Target(tags=("public",)),
            rollout=rollout,
            limits=PolicyLimits(max_relative_edit=0.02, allowed_saes=("sae-3",)),
            rules=tuple(
                Rule(
                    f"rule-{index}",
                    replace(edits[(number * RULES + index) % len(edits)], value=1.0 + index),
                )
                for index in range(RULES)
            ),
        )
        for number in range(POLICIES)
    )


def snapshot(rollout: Rollout = EVERYBODY) -> Snapshot:
    """All of them in force."""
    revision = PolicyRevision(number=1, policies=policies(rollout), author="bench", time=NOW, reason="bench")
    activation = Activation(number=1, revision=1, actor="bench", time=NOW, reason="bench")
    return build_snapshot(activation, revision, engine(), NOW)


def own(count: int) -> tuple[Intervention, ...]:
    """Edits of a request: every second on a feature that a rule caps."""
    edits = []
    for index in range(count):
        is_ruled = index % 2 == 0
        edits.append(Cap("sae-3", index, 0.5) if is_ruled else Scale("sae-3", FEATURES + index, 2.0))
    return tuple(edits)


def microseconds(work: Callable[[], object], rounds: int = ROUNDS) -> dict[str, float]:
    """Of one call."""
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        spent.append((time.perf_counter() - began) * 1e6)
    cuts = statistics.quantiles(spent, n=100)
    return {"median_us": round(cuts[49], 1), "p99_us": round(cuts[98], 1)}


def measure(name: str, found: Snapshot, request: GenerateRequest) -> bool:
    """Prints one line; whether it is what was aimed at."""
    reach = TokenRange((1,) * 64, 192, frozenset())

    def whole() -> None:
        one = resolve_policies(request, CALLER, found, NOW)
        steer(one.edits, one.triggers, one.max_relative_edit, reach)

    alone = microseconds(lambda: resolve_policies(request, CALLER, found, NOW))
    is_met = alone["median_us"] < TARGET_US
    line = {"figure": name, "resolve": alone, "with_steer": microseconds(whole), "target_us": TARGET_US, "met": is_met}
    say(line)
    return is_met


def main() -> None:
    """Ends with 1 where a figure is missed."""
    found = snapshot()
    plain = GenerateRequest(input="x")
    asking = GenerateRequest(input="x", interventions=own(4))
    results = [
        measure("a request without edits", found, plain),
        measure("a request without edits, rollout by half", snapshot(Rollout(share=0.5)), plain),
        measure("a request with 4 edits, 2 of them on capped features", found, asking),
    ]
    began = time.perf_counter()
    fresh = snapshot()
    built = time.perf_counter()
    resolve_policies(plain, CALLER, fresh, NOW)
    times = {
        "build_ms": round((built - began) * 1e3, 2),
        "first_request_ms": round((time.perf_counter() - built) * 1e3, 2),
    }
    say({"figure": "a new activation", **times})
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
