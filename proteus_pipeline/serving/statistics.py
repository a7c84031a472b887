"""What a model cache counts, and how it is told: as a mapping, and as Prometheus's metrics."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import quantiles
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CAUSES = ("room", "shrunk", "expired", "invalidated", "cleared")
_KEPT = 1000  # of the latest loads and evictions, for their quantiles


@dataclass
class Counts:
    """Counters of one cache, since it was made.

    Attributes
    ----------
    hits, misses
        Requests for a model that was loaded, and for one that was not.
    loads, restored, failures
        Loads from a source, from a compressed copy, and those that failed.
    evictions
        Models that were let go, by cause: `CAUSES`.
    load_seconds, ages
        Seconds that the latest loads took, and that the latest models evicted had been there.

    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    restored: int = 0
    failures: int = 0
    evictions: Counter[str] = field(default_factory=Counter)
    load_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    ages: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def asked(self, *, hit: bool) -> None:
        """Count a request; what a call asks for again is its lease's request, and was counted then."""
        self.hits += hit
        self.misses += not hit

    def as_mapping(self) -> dict[str, Any]:
        """Return the counters, with the hit rate and the median and 95th percentile of seconds; None where there are none."""
        asked = self.hits + self.misses
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hits / asked if asked else None,
            "loads": self.loads,
            "restored": self.restored,
            "load_failures": self.failures,
            "load_seconds": _spread(self.load_seconds),
            "evictions": {cause: self.evictions[cause] for cause in CAUSES},
            "age_at_eviction_seconds": _spread(self.ages),
        }


def _spread(seconds: deque[float]) -> dict[str, float | None]:
    if not seconds:
        return {"p50": None, "p95": None}
    if len(seconds) == 1:
        return {"p50": seconds[0], "p95": seconds[0]}
    cuts = quantiles(seconds, n=20, method="inclusive")
    return {"p50": cuts[9], "p95": cuts[18]}


def metrics(stats: dict[str, Any]) -> Iterator[Metric]:
    """Yield the numbers of `proteus_pipeline.ModelCacheManager.get_cache_stats` as Prometheus's metrics."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    def family(
        kind: type[Metric], name: str, text: str, label: str | None, samples: Mapping[str, float | None]
    ) -> Metric:
        made = kind(f"proteus_cache_{name}", text, labels=["cache", *([label] if label else [])])  # type: ignore[call-arg]
        for value, number in samples.items():
            if number is not None:
                made.add_metric(["model", *([value] if label else [])], number)  # type: ignore[attr-defined]
        return made

    counter, gauge = CounterMetricFamily, GaugeMetricFamily
    requests = {"hit": stats["hits"], "miss": stats["misses"]}
    yield family(counter, "requests", "Requests for a loaded model.", "result", requests)
    loads = {"weights": stats["loads"], "compressed": stats["restored"]}
    yield family(counter, "loads", "Models loaded.", "source", loads)
    yield family(counter, "load_failures", "Loads that failed.", None, {"": stats["load_failures"]})
    yield family(counter, "evictions", "Models let go, by cause.", "cause", stats["evictions"])
    held = gauge("proteus_cache_bytes", "Bytes that count against the limit.", labels=["cache", "device", "kind"])
    limit = gauge("proteus_cache_limit_bytes", "Bytes that there may be.", labels=["cache", "device"])
    for device, of in stats["devices"].items():
        limit.add_metric(["model", device], of["limit_bytes"])
        for name, count in of.items():
            if name != "limit_bytes":
                held.add_metric(["model", device, name.removesuffix("_bytes")], count)
    yield from (held, limit)
    yield family(gauge, "leases", "Leases that are held.", None, {"": stats["leases"]})
    for name, text in (("load_seconds", "Seconds a load took."), ("age_at_eviction_seconds", "Age of a model let go.")):
        yield family(gauge, name, text, "quantile", {f"0.{p[1:]}": value for p, value in stats[name].items()})
