"""The composition root: builds each part by calling its constructor, in the diagram's order, and closes in reverse."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc
import msgspec
from prometheus_client import CollectorRegistry

from saeguard_server.activations import ReadActivations
from saeguard_server.admission import Admission, RpcLimiter
from saeguard_server.audit.log import Audit
from saeguard_server.catalog import Catalog, describe_model, describe_server
from saeguard_server.engine.choice import LoadedEngine, load_engine
from saeguard_server.generation import Compare, Counterfactuals, Generation, RequestRecorder
from saeguard_server.identity import auth
from saeguard_server.identity.auth import Identity
from saeguard_server.observe import Exporter, Metrics
from saeguard_server.policy.sync import Enforcement, enforcing, opened
from saeguard_server.rpc import server as edge
from saeguard_server.rpc.interceptor import AuthInterceptor, RpcInterceptor
from saeguard_server.rpc.policy import PolicyServicer
from saeguard_server.rpc.server import Health, ServerInfoServicer
from saeguard_server.rpc.services import ActivationServicer, CatalogServicer, GenerationServicer
from saeguard_server.settings import DEMO, Address, BadSettings, ServedSaeSettings, ServerSettings, Settings

# Where the demo model and its SAEs are: what ``saeguard serve`` serves when nothing else is named.


ASSETS = Path(__file__).parent / "demo" / "assets"


def resolve_bundled(settings: Settings, assets: Path = ASSETS) -> Settings:
    """The settings with "demo" replaced by the bundled folders and text; all bundled SAEs where none is named.

    Raises:
        BadSettings: the assets are not installed.
    """
    if settings.model.path != DEMO:
        return settings
    folder = assets / "model"
    if not folder.is_dir():
        raise BadSettings("model.path: the demo model is not part of this installation; give --model")
    model = msgspec.structs.replace(settings.model, path=str(folder), name=settings.model.name or DEMO)
    text = assets / "calibration.txt"
    check = msgspec.structs.replace(settings.check, text=settings.check.text or (str(text) if text.is_file() else None))
    saes = settings.saes or _bundled_saes(assets / "saes")
    return msgspec.structs.replace(settings, model=model, saes=saes, check=check)


def _bundled_saes(folder: Path) -> tuple[ServedSaeSettings, ...]:
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return tuple(ServedSaeSettings(name=path.name, path=str(path)) for path in found)


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
    _frame: RpcInterceptor
    _admission: RpcLimiter
    _health: Health
    _settings: ServerSettings

    @classmethod
    @asynccontextmanager
    async def build(cls, settings: Settings, load: Loader | None = None) -> AsyncIterator[App]:
        """The whole server, listening. ``load`` replaces the engine that the settings ask for.

        Raises:
            BadSettings: an address, a file, the policies' store, the model or an SAE is not usable.
        """
        settings = resolve_bundled(settings)
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
            keeping = RequestRecorder(audit, metrics.policy_rules, counterfactuals)
            gate = Admission(engine, metrics, settings.engine.max_slots)
            admission = RpcLimiter(
                engine, gate.turns, metrics, max_queue=settings.limits.max_queue, max_slots=settings.engine.max_slots
            )
            health = Health(edge.SERVICES)
            servicers = _servicers(settings, engine, admission, gate, health, enforced, keeping, audit)
            doorman = AuthInterceptor(identity, auth.role_table(settings.policies.second_person), metrics)
            frame = RpcInterceptor(metrics, admission, doorman, settings.limits.max_deadline_s)
            server = edge.build_server(servicers, frame, settings.server)
            address = edge.listen_on(server, settings.server)
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


async def _cut_off(server: grpc.aio.Server, frame: RpcInterceptor) -> None:
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
    admission: RpcLimiter,
    gate: Admission,
    health: Health,
    enforced: Enforcement | None,
    keeping: RequestRecorder,
    audit: Audit,
) -> edge.Servicers:
    limits = settings.limits
    policies = None if enforced is None else enforced.policies
    generate = Generation(engine, engine.tokenizer, limits, gate, policies, keeping)
    read = ReadActivations(engine, engine.tokenizer, limits, gate)
    return edge.Servicers(
        generation=GenerationServicer(generate, Compare(engine, generate, gate, keeping), admission, limits),
        activation=ActivationServicer(read, admission, limits),
        catalog=CatalogServicer(Catalog(engine.saes), describe_model(engine)),
        policy=PolicyServicer(enforced, audit),
        server_info=ServerInfoServicer(describe_server(engine, settings)),
        health=health,
    )


def _is_ready(engine: LoadedEngine, admission: RpcLimiter, enforced: Enforcement | None) -> bool:
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
