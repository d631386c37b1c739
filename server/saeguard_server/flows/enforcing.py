"""Policies while the server runs: their store, the snapshot that follows it, and what people may do to them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from saeguard_server.engine.protocol import Engine
from saeguard_server.flows.serving import ServedModel
from saeguard_server.guard.policy import snapshot
from saeguard_server.guard.policy.administration import Administration
from saeguard_server.guard.policy.checking import check_or_refuse
from saeguard_server.guard.policy.model import Policy
from saeguard_server.guard.policy.snapshot import Policies, Snapshot
from saeguard_server.guard.policy.store.opening import open_store
from saeguard_server.guard.policy.store.protocol import Active, PolicyStore, StoreError
from saeguard_server.guard.policy.sync import PolicySync
from saeguard_server.observe.metrics import Metrics
from saeguard_server.policy_settings import NO_STORE, PolicySettings
from saeguard_server.settings import BadSettings


@dataclass(frozen=True, slots=True)
class Enforcement:
    """What a server with a store of policies has."""

    policies: Policies
    administration: Administration
    look_now: Callable[[], Awaitable[None]]
    """Looks at the store at once: what was put in force before is then enforced here."""


@asynccontextmanager
async def opened(settings: PolicySettings) -> AsyncIterator[PolicyStore | None]:
    """The store that the settings name; None if they name none.

    Raises:
        BadSettings: it cannot be reached or used.
    """
    if settings.store == NO_STORE:
        yield None
        return
    try:
        store = await open_store(settings.store)
    except (StoreError, ValueError) as err:
        raise BadSettings(f"policies.store: {err}") from err
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def enforcing(
    store: PolicyStore | None, settings: PolicySettings, engine: Engine, metrics: Metrics, *, keeps_audit: bool = False
) -> AsyncIterator[Enforcement | None]:
    """Follows the store until the block ends, after a first look; None without a store.

    Whatever that look finds, the block runs: a first revision can only be put in force through a server.
    """
    if store is None:
        yield None
        return
    served = ServedModel(engine, keeps_audit=keeps_audit)

    def build(active: Active) -> Snapshot:
        return snapshot.build(active.activation, active.revision, served, datetime.now(UTC))

    def check(policies: Sequence[Policy]) -> tuple[str, ...]:
        return check_or_refuse(policies, served, datetime.now(UTC))

    policies = Policies(settings.stale_after_s)
    sync = PolicySync(store, policies, build, metrics, poll_s=settings.poll_s)
    async with sync.running():
        administration = Administration(store, check, second_person=settings.second_person)
        yield Enforcement(policies, administration, sync.look_now)
