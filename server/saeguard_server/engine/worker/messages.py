"""What parent and child say to each other. The child gets a ``Start``, then commands; it sends ``Ready`` or
``Refused``, then reports."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any, Protocol, TypeAlias

import torch
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from torch import Tensor

from saeguard.catalog import Model
from saeguard.results import ActivationPart, FeatureReading, StreamChunk, Token, TokenLogprob, TokenText
from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.protocol import Capabilities, Engine, GenerateTask, InspectTask
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.errors import SaeguardError
from saeguard_server.observe import Metrics
from saeguard_server.settings import Settings

# What the front end knows of an SAE whose weights are in another process: everything but the weights.
#
# Its tensors are on torch's "meta" device: shapes without memory. The class is the real one, so that whoever asks
# what the SAE is (how wide, what architecture, whether it can be edited) gets the answer it would get in the engine,
# and whoever computes with it gets an error and not a wrong number.


_ROWS = 4096
"""Decoder rows turned to float32 at once."""


@dataclass(frozen=True, slots=True, eq=False)
class RemoteSae(LoadedSae):
    """An SAE without its weights."""

    decoder_norms: Tensor = field(kw_only=True)
    """[d_sae] lengths of the decoder's rows, in float32: what the unit "unit_decoder" needs."""

    def decoder_norm(self, feature: int) -> float:
        """The length of what one unit of the feature writes."""
        return float(self.decoder_norms[feature])


def remote_sae(sae: LoadedSae) -> RemoteSae:
    """The SAE as the front end gets it."""
    known = {one.name: getattr(sae, one.name) for one in fields(LoadedSae)}
    known |= {name: to_meta(known[name]) for name in ("dictionary", "write_gain")}
    return RemoteSae(**known, decoder_norms=_norms(sae.dictionary.W_dec))


def to_meta(value: Any) -> Any:
    """The same value with every tensor in it on the meta device."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(to_meta(one) for one in value)
    if isinstance(value, dict):
        return {key: to_meta(one) for key, one in value.items()}
    return _hollow_object(value) if is_dataclass(value) else value


def _hollow_object(value: Any) -> Any:
    # Not through the constructor: it checks that weights are finite, which was done where they are.
    made = object.__new__(type(value))
    for one in fields(value):
        object.__setattr__(made, one.name, to_meta(getattr(value, one.name)))
    return made


def _norms(W_dec: Tensor) -> Tensor:
    """W_dec [d_sae, d_out] -> [d_sae], on the host."""
    parts = [W_dec[first : first + _ROWS].float().norm(dim=1) for first in range(0, len(W_dec), _ROWS)]
    return torch.cat(parts).cpu()


class InnerEngine(Engine, Protocol):
    """The engine that the child runs, with the tokenizer of its model."""

    @property
    def tokenizer(self) -> Tokenizer: ...


Loader: TypeAlias = Callable[[Settings, Metrics], InnerEngine]
"""Makes the engine in the child; a function of a module, since it travels by its name."""

Samples: TypeAlias = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values of one metric by name and labels."""
Counts: TypeAlias = dict[str, Samples]
"""Everything that a process counted, by metric."""


@dataclass(frozen=True, slots=True)
class Start:
    """The first message to a child."""

    settings: Settings
    load: Loader


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """The engine is loaded. ``now`` is the child's ``time.monotonic()``.

    The tokenizer travels as a whole, so that both sides have the same one whatever happens to its files.
    """

    now: float
    model: Model
    capabilities: Capabilities
    saes: dict[str, RemoteSae]
    tokenizer: Tokenizer

    def differs_from(self, other: WorkerReady) -> bool:
        """Whether it would give other answers."""
        return self._identity() != other._identity()

    def _identity(self) -> tuple[str, Capabilities, Mapping[str, str]]:
        return self.model.digest, self.capabilities, {name: sae.digest for name, sae in self.saes.items()}


@dataclass(frozen=True, slots=True)
class WorkerRefused:
    """The engine cannot be loaded; ``error`` is what loading raised."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Submit:
    """A task under the number that its events will have."""

    uid: int
    task: GenerateTask | InspectTask


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants this task's events any more."""

    uid: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything and exit."""


Command: TypeAlias = Submit | Cancel | Stop


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """A SaeguardError on its way: their constructors take other arguments than exceptions are pickled with."""

    kind: type[SaeguardError]
    args: tuple[Any, ...]
    facts: dict[str, Any]

    @classmethod
    def of(cls, error: SaeguardError) -> WorkerFailure:
        """The error, ready to be sent."""
        return cls(type(error), error.args, vars(error))

    def error(self) -> SaeguardError:
        """The error as it was: class, message, field, seconds to wait."""
        made = self.kind.__new__(self.kind, *self.args)
        vars(made).update(self.facts)
        return made


Event: TypeAlias = StreamChunk | ActivationPart | WorkerFailure | None
"""What a task's owner gets; a failure, a completion, or None after the last activation part ends it."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What happened since the last one; sent after each step of the engine and once a second."""

    events: list[tuple[int, Event]]
    is_ready: bool
    taken: int
    """Tasks that have arrived so far."""
    waiting: int
    """Tasks that wait for a slot."""
    counts: Counts | None
    """The metrics, once a second."""


# Messages as bytes on a socket pair.
#
# Pickle is safe here and nowhere else: the pair is made before the child, has no name, and only these two processes
# of the same code hold its ends. Whoever could write to it could write to their memory.


_PROTOCOL = 5
_EACH_STEP = (ActivationPart, StreamChunk, FeatureReading, Token, TokenLogprob, TokenText)


def _by_fields(kind: type[Any]) -> Callable[[Any], tuple[type[Any], tuple[Any, ...]]]:
    """Reduces a dataclass to its class and its values: a third of what it takes through its own state."""
    values = attrgetter(*(field.name for field in fields(kind)))
    return lambda one: (kind, values(one))


class _Pickler(pickle.Pickler):
    dispatch_table = copyreg.dispatch_table | {kind: _by_fields(kind) for kind in _EACH_STEP}


def dump_message(message: object) -> bytes:
    """The message as bytes."""
    buffer = io.BytesIO()
    _Pickler(buffer, _PROTOCOL).dump(message)
    return buffer.getvalue()


def send_message(connection: Connection, message: object) -> None:
    """Sends one message, waiting until the other side has room for it.

    Raises:
        OSError: the other side is gone.
    """
    connection.send_bytes(dump_message(message))


def receive_message(connection: Connection) -> Any:
    """The next message, waiting for it.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    return pickle.loads(connection.recv_bytes())


# The metrics of an engine that lives in processes that come and go, on the server's own /metrics.
#
# A child counts in a registry of its own and sends all of it once a second. Shown are the server's own values, plus
# the last counts of every child that is gone, plus those of the one that runs: so a counter never goes back, and a
# child that is killed takes at most a second of counts with it. Gauges of a child that is gone are gone too.


def count_metrics(registry: CollectorRegistry) -> Counts:
    """Everything in a registry."""
    return {
        family.name: {(one.name, tuple(one.labels.items())): one.value for one in family.samples}
        for family in registry.collect()
    }


class SummedMetrics(Collector):
    """Stands in the server's registry in place of its metrics, with the children's counts added."""

    def __init__(self, metrics: Metrics) -> None:
        self._own = [one for one in vars(metrics).values() if isinstance(one, MetricWrapperBase)]
        self._past_and_live: tuple[Counts, Counts] = {}, {}
        """Replaced as one, since another thread may be collecting."""
        for one in self._own:
            metrics.registry.unregister(one)
        metrics.registry.register(self)

    def update(self, counts: Counts) -> None:
        """The child that runs counted this so far."""
        self._past_and_live = self._past_and_live[0], counts

    def ended(self) -> None:
        """The child that ran is gone."""
        past, live = self._past_and_live
        gauges = {family.name for family in self.describe() if family.type == "gauge"}
        kept = {name: _add([past.get(name, {}), samples]) for name, samples in live.items() if name not in gauges}
        self._past_and_live = past | kept, {}

    def describe(self) -> Iterable[Metric]:
        """The names, without values."""
        return [family for one in self._own for family in one.describe()]

    def collect(self) -> Iterable[Metric]:
        """Every metric with its total."""
        parts = self._past_and_live
        for one in self._own:
            for family in one.collect():
                yield _total(family, [part.get(family.name, {}) for part in parts])


def _total(own: Metric, children: list[Samples]) -> Metric:
    total = Metric(own.name, own.documentation, own.type, own.unit)
    values = _add([{(one.name, tuple(one.labels.items())): one.value for one in own.samples}, *children])
    for (name, labels), value in values.items():
        total.add_sample(name, dict(labels), value)
    return total


def _add(parts: list[Samples]) -> Samples:
    """Sums by name and labels; of times of creation the first."""
    total: Samples = {}
    for part in parts:
        for key, value in part.items():
            if key not in total:
                total[key] = value
            elif key[0].endswith("_created"):
                total[key] = min(total[key], value)
            else:
                total[key] += value
    return total
