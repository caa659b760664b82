"""A registry that knows what was defined in it, so that the reference and the dashboards can be checked against it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

PREFIX = "fuseline_"

MetricType = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """One metric, as the reference lists it."""

    name: str
    """As in a query; a counter's ends in ``_total``."""
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> dict[str, frozenset[str]]:
        """Every series name of the metric, with the labels that it carries."""
        labels = frozenset(self.labels)
        if self.type != "histogram":
            return {self.name: labels}
        return {
            f"{self.name}_bucket": labels | {"le"},
            f"{self.name}_sum": labels,
            f"{self.name}_count": labels,
        }


class Registry(CollectorRegistry):
    """Makes metrics under one prefix and remembers them in ``infos``."""

    def __init__(self) -> None:
        super().__init__()
        self.infos: list[MetricInfo] = []

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """Define a counter."""
        info = self._remember(name, "counter", text, labels)
        return Counter(info.name, info.help, info.labels, registry=self)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """Define a gauge."""
        info = self._remember(name, "gauge", text, labels)
        return Gauge(info.name, info.help, info.labels, registry=self)

    def histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float]) -> Histogram:
        """Define a histogram. ``buckets`` are upper bounds in the metric's unit."""
        info = self._remember(name, "histogram", text, labels)
        return Histogram(info.name, info.help, info.labels, buckets=buckets, registry=self)

    def _remember(self, name: str, kind: MetricType, text: str, labels: tuple[str, ...]) -> MetricInfo:
        info = MetricInfo(PREFIX + name, kind, text, labels)
        self.infos.append(info)
        return info

    def collect(self) -> Iterable[Metric]:
        """Give all metrics, without the ``_created`` series that the client library adds and nobody here reads."""
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
