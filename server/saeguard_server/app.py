"""The composition root: builds each part by calling its constructor, in the diagram's order, and closes in reverse."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TypeAlias

import grpc
from prometheus_client import CollectorRegistry

from saeguard_server import bundled
from saeguard_server.address import Address
from saeguard_server.edge import server as edge
from saeguard_server.edge.activation import ActivationServicer
from saeguard_server.edge.catalog import CatalogServicer
from saeguard_server.edge.doorman import Doorman
from saeguard_server.edge.generation import GenerationServicer
from saeguard_server.edge.health import Health
from saeguard_server.edge.interceptor import Frame
from saeguard_server.edge.policy import PolicyServicer
from saeguard_server.edge.server_info import ServerInfoServicer
from saeguard_server.engine.choice import LoadedEngine, load_engine
from saeguard_server.flows.activations import ReadActivations
from saeguard_server.flows.catalog import Catalog
from saeguard_server.flows.compare import Compare
from saeguard_server.flows.counterfactual import Counterfactuals
from saeguard_server.flows.enforcing import Enforcement, enforcing, opened
from saeguard_server.flows.generate import Generate
from saeguard_server.flows.info import describe
from saeguard_server.flows.keeping import Keeping
from saeguard_server.guard.audit.audit import Audit
from saeguard_server.guard.gate import Gate
from saeguard_server.guard.identity import access
from saeguard_server.guard.identity.identity import Identity
from saeguard_server.guard.limits import Admission
from saeguard_server.observe.exporter import Exporter
from saeguard_server.observe.metrics import Metrics
from saeguard_server.settings import ServerSettings, Settings

LOG = logging.getLogger("saeguard.app")

LAST_WORDS_S = 0.25
"""For the last replies, which are handed to the core but may not be sent yet."""
UNWIND_S = 2.0
"""For handlers to end after their RPCs were cut off."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


Loader: TypeAlias = Callable[[Settings, Metrics], LoadedEngine]


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """A server that listens. ``address`` and ``metrics_port`` are the real ones where port 0 was asked for."""

    address: Address
    metrics_port: int | None
    engine: LoadedEngine
    metrics: Metrics
    _server: grpc.aio.Server
    _frame: Frame
    _admission: Admission
    _health: Health
    _settings: ServerSettings

    @classmethod
    @asynccontextmanager
    async def build(cls, settings: Settings, load: Loader | None = None) -> AsyncIterator[App]:
        """The whole server, listening. ``load`` replaces the engine that the settings ask for.

        Raises:
            BadSettings: an address, a file, the policies' store, the model or an SAE is not usable.
        """
        settings = bundled.resolve(settings)
        # Before the engine: a file of keys that cannot be used need not wait for a model.
        identity = Identity.of(settings.identity)
        async with AsyncExitStack() as stack:
            metrics = Metrics(CollectorRegistry())
            metrics_port = _export(settings.server, metrics, stack)
            audit = Audit.of(settings.audit, metrics)
            stack.callback(audit.close)
            store = await stack.enter_async_context(opened(settings.policies))
            engine = (load or load_engine)(settings, metrics)
            stack.callback(engine.stop)
            engine.start()
            enforced = await stack.enter_async_context(
                enforcing(store, settings.policies, engine, metrics, keeps_audit=audit.is_kept)
            )
            counterfactuals = Counterfactuals(engine, metrics)
            await stack.enter_async_context(counterfactuals.running())
            keeping = Keeping(audit, metrics.policy_rules, counterfactuals)
            gate = Gate(engine, metrics, settings.engine.max_slots)
            admission = Admission(
                engine, gate.turns, metrics, max_queue=settings.limits.max_queue, max_slots=settings.engine.max_slots
            )
            health = Health(edge.SERVICES)
            servicers = _servicers(settings, engine, admission, gate, health, enforced, keeping, audit)
            doorman = Doorman(identity, access.table(settings.policies.second_person), metrics)
            frame = Frame(metrics, admission, doorman, settings.limits.max_deadline_s)
            server = edge.build(servicers, frame, settings.server)
            address = edge.listen(server, settings.server)
            await server.start()
            stack.push_async_callback(_cut_off, server, frame)
            stack.enter_context(_following(health, lambda: _is_ready(engine, admission, enforced)))
            yield cls(
                address=address,
                metrics_port=metrics_port,
                engine=engine,
                metrics=metrics,
                _server=server,
                _frame=frame,
                _admission=admission,
                _health=health,
                _settings=settings.server,
            )

    @property
    def port(self) -> int:
        """The port that serves gRPC."""
        return self.address.port

    async def serve_until_stopped(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains; a second signal stops at once."""
        with _signals() as received:
            fields = {"address": str(self.address), "model": self.engine.model.name, "saes": sorted(self.engine.saes)}
            LOG.info("serving", extra={"fields": fields})
            await received.get()
            draining = asyncio.create_task(self.drain())
            again = asyncio.create_task(received.get())
            await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
            for task in (draining, again):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await _cut_off(self._server, self._frame)
        LOG.info("stopped")

    async def drain(self) -> None:
        """Says NOT_SERVING, waits for load balancers to notice, refuses what is new, lets what runs finish."""
        LOG.info("draining", extra={"fields": {"drain_s": self._settings.drain_s}})
        self._admission.leave()
        self._health.set_ready(False)
        await asyncio.sleep(self._settings.drain_delay_s)
        self._admission.close()
        # Not server.stop(drain_s): an open health Watch would make it last all of that.
        if await self._admission.idle(within_s=self._settings.drain_s):
            LOG.info("drained")
            await self._server.stop(LAST_WORDS_S)
        else:
            LOG.warning("cutting off what still runs")


async def _cut_off(server: grpc.aio.Server, frame: Frame) -> None:
    """Ends whatever still runs, an open health Watch too."""
    await server.stop(None)
    # Handlers hear of it a little later; the engine must outlive them.
    await frame.open.ended(within_s=UNWIND_S)


def _export(settings: ServerSettings, metrics: Metrics, stack: AsyncExitStack) -> int | None:
    if not settings.metrics_listen:
        return None
    return stack.enter_context(Exporter(metrics.registry, Address.parse(settings.metrics_listen))).port


def _servicers(
    settings: Settings,
    engine: LoadedEngine,
    admission: Admission,
    gate: Gate,
    health: Health,
    enforced: Enforcement | None,
    keeping: Keeping,
    audit: Audit,
) -> edge.Servicers:
    limits = settings.limits
    policies = None if enforced is None else enforced.policies
    generate = Generate(engine, engine.tokenizer, limits, gate, policies, keeping)
    read = ReadActivations(engine, engine.tokenizer, limits, gate)
    return edge.Servicers(
        generation=GenerationServicer(generate, Compare(engine, generate, gate, keeping), admission, limits),
        activation=ActivationServicer(read, admission, limits),
        catalog=CatalogServicer(Catalog(engine.saes), engine.model, engine.capabilities),
        policy=PolicyServicer(enforced, audit),
        server_info=ServerInfoServicer(describe(engine, settings)),
        health=health,
    )


def _is_ready(engine: LoadedEngine, admission: Admission, enforced: Enforcement | None) -> bool:
    is_enforcing = enforced is None or enforced.policies.is_current()
    return engine.is_ready() and is_enforcing and not admission.is_leaving


@contextmanager
def _following(health: Health, is_ready: Callable[[], bool]) -> Iterator[None]:
    """Health follows the engine and the policies for as long as the server runs."""
    task = asyncio.create_task(health.follow(is_ready))
    try:
        yield
    finally:
        task.cancel()


@contextmanager
def _signals() -> Iterator[asyncio.Queue[int]]:
    """The stop signals as they come, in place of what they do otherwise."""
    loop = asyncio.get_running_loop()
    received: asyncio.Queue[int] = asyncio.Queue()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, received.put_nowait, number)
    try:
        yield received
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
