"""The metrics of an engine that lives in processes that come and go, on the server's own /metrics.

A child counts in a registry of its own and sends all of it once a second. Shown are the server's own values, plus the
last counts of every child that is gone, plus those of the one that runs: so a counter never goes back, and a child that
is killed takes at most a second of counts with it. Gauges of a child that is gone are gone too.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from saeguard_server.engine.process.messages import Counts, Samples
from saeguard_server.observe.metrics import Metrics


def count(registry: CollectorRegistry) -> Counts:
    """Everything in a registry."""
    return {
        family.name: {(one.name, tuple(one.labels.items())): one.value for one in family.samples}
        for family in registry.collect()
    }


class AddedUp(Collector):
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
