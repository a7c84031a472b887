"""The metrics at one moment, and how they are told: to Prometheus, as its text, as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from proteus_pipeline.metrics.catalogue import CATALOGUE, Metric
from proteus_pipeline.metrics.lines import Series, by_name, observed

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family


@dataclass
class Observed:
    """A histogram: how many fall into each bucket alone, by its bound, and the sum of all."""

    counts: dict[str, float] = field(default_factory=dict)
    sum: float = 0.0

    def cumulative(self, metric: Metric) -> list[tuple[str, float]]:
        """Return how many are at most each bound, as Prometheus has it; bounds of another version are kept."""
        shown = self.counts.keys() | observed(metric.buckets, ()).keys()
        bounds = sorted(shown, key=lambda bound: math.inf if bound == "+Inf" else float(bound))
        return list(zip(bounds, accumulate(self.counts.get(bound, 0.0) for bound in bounds), strict=True))


class Readings:
    """Numbers by metric and labels, all of the catalogue.

    Parameters
    ----------
    shown
        `proteus_pipeline.metrics.catalogue.MONITOR` or ``SERVICE``: whose metrics these are.

    """

    def __init__(self, shown: str) -> None:
        self.metrics = {name: metric for name, metric in CATALOGUE.items() if shown in metric.shown}
        self.values: dict[str, dict[tuple[str, ...], float | Observed]] = {name: {} for name in self.metrics}

    def zero(self, *of: str) -> None:
        """Put 0 for all that processes count under: of these caches alone, or of everything where none is named."""
        for name, metric in self.metrics.items():
            for labels in metric.known:
                if not of or metric.labels[:1] != ("cache",) or labels[0] in of:
                    self.values[name][labels] = Observed() if metric.kind == "histogram" else 0.0

    def set(self, name: str, value: float | Observed, **labels: str) -> None:
        """Put a number in its place."""
        self.values[name][tuple(labels[label] for label in self.metrics[name].labels)] = value

    def add_counts(self, found: Mapping[Series, float]) -> None:
        """Put what was counted in its place; what the catalogue does not know, of another version, is passed over."""
        for series, labels, value in by_name(found):
            name, part = series, ""
            for suffix in ("_bucket", "_sum"):
                if series.endswith(suffix) and series.removesuffix(suffix) in self.metrics:
                    name, part = series.removesuffix(suffix), suffix
            metric = self.metrics.get(name)
            bound = labels.pop("le", "")
            if metric is None or set(metric.labels) != labels.keys() or bool(part) != (metric.kind == "histogram"):
                continue
            if metric.kind == "counter":
                self.set(name, value, **labels)
            elif metric.kind == "histogram":
                self._observe(name, labels, part, bound, value)

    def _observe(self, name: str, labels: Mapping[str, str], part: str, bound: str, value: float) -> None:
        key = tuple(labels[label] for label in self.metrics[name].labels)
        held = self.values[name].setdefault(key, Observed())
        if not isinstance(held, Observed):
            return
        if part == "_sum":
            held.sum = value
        elif _is_bound(bound):
            held.counts[bound] = value

    def families(self) -> Iterator[Family]:
        """Yield what prometheus_client collects."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        for name, metric in self.metrics.items():
            kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
            family = kinds[metric.kind](name, metric.text, labels=metric.labels)
            for labels, value in self.values[name].items():
                if isinstance(value, Observed):
                    family.add_metric(labels, value.cumulative(metric), value.sum)
                else:
                    family.add_metric(labels, value)
            if self.values[name]:
                yield family

    def collect(self) -> Iterator[Family]:
        """As `families`: what a registry of prometheus_client asks for."""
        return self.families()

    def text(self) -> str:
        """Return the text that Prometheus reads."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry).decode()

    def to_json(self) -> list[dict[str, Any]]:
        """Return the metrics as JSON takes them: of each its name, type, unit, meaning and samples."""
        return [
            {
                "name": name,
                "type": metric.kind,
                "unit": metric.unit,
                "help": metric.text,
                "samples": [
                    {"labels": dict(zip(metric.labels, labels, strict=True))} | _plain(metric, value)
                    for labels, value in self.values[name].items()
                ],
            }
            for name, metric in self.metrics.items()
            if self.values[name]
        ]


def _is_bound(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def _plain(metric: Metric, value: float | Observed) -> dict[str, Any]:
    if not isinstance(value, Observed):
        return {"value": value}
    buckets = value.cumulative(metric)
    return {"count": buckets[-1][1], "sum": value.sum, "buckets": dict(buckets)}
