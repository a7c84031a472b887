"""What a model cache counts, and how it is told: as a mapping, and as Prometheus's metrics."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

from proteus_pipeline.metrics.catalogue import CATALOGUE, CAUSES, MODELS, SERVICE
from proteus_pipeline.metrics.lines import observed
from proteus_pipeline.metrics.readings import Observed, Readings
from proteus_pipeline.stores.counts import count

_KEPT = 1000  # of the latest loads and evictions, for their quantiles
_LOAD, _AGE = "proteus_cache_load_seconds", "proteus_cache_eviction_age_seconds"


@dataclass
class Seconds:
    """Durations: the latest, for their quantiles, and all, for a histogram."""

    name: str
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    all: Observed = field(default_factory=Observed)

    def __post_init__(self) -> None:
        # All bounds from the start: a scrape goes over them while loads are counted.
        self.all.counts = observed(CATALOGUE[self.name].buckets, ())

    def add(self, seconds: float) -> None:
        """Add one, to what this process has its counts kept in too."""
        self.latest.append(seconds)
        self.all.sum += seconds
        for bound, number in observed(CATALOGUE[self.name].buckets, [seconds]).items():
            self.all.counts[bound] += number
        count(self.name, seconds, cache=MODELS)

    def spread(self) -> dict[str, float | None]:
        """Return the median and the 95th percentile of the latest; None where there are none."""
        if len(self.latest) < 2:
            value = self.latest[0] if self.latest else None
            return {"p50": value, "p95": value}
        cuts = quantiles(self.latest, n=20, method="inclusive")
        return {"p50": cuts[9], "p95": cuts[18]}


@dataclass
class Counts:
    """Counters of one cache, since it was made; what is counted here is also counted for the project, where it is kept.

    Attributes
    ----------
    hits, misses
        Requests for a model that was loaded, and for one that was not.
    loads, restored, failures
        Loads from a source, from a compressed copy, and those that failed.
    evictions
        Models that were let go, by cause: `CAUSES`.
    load_seconds, ages
        Seconds that loads took, and that models that were let go had been there.

    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    restored: int = 0
    failures: int = 0
    evictions: Counter[str] = field(default_factory=Counter)
    load_seconds: Seconds = field(default_factory=lambda: Seconds(_LOAD))
    ages: Seconds = field(default_factory=lambda: Seconds(_AGE))

    def asked(self, *, hit: bool) -> None:
        """Count a request; what a call asks for again is its lease's request, and was counted then."""
        self.hits += hit
        self.misses += not hit
        count("proteus_cache_requests_total", cache=MODELS, result="hit" if hit else "miss")

    def loaded(self, *, restored: bool) -> None:
        """Count a load."""
        self.restored += restored
        self.loads += not restored
        count("proteus_cache_loads_total", cache=MODELS, source="compressed" if restored else "weights")

    def failed(self) -> None:
        """Count a load that failed."""
        self.failures += 1
        count("proteus_cache_load_failures_total", cache=MODELS)

    def let_go(self, cause: str, age: float) -> None:
        """Count a model that was let go, after so many seconds."""
        self.evictions[cause] += 1
        self.ages.add(age)
        count("proteus_cache_evictions_total", cache=MODELS, cause=cause)

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
            "load_seconds": self.load_seconds.spread(),
            "evictions": {cause: self.evictions[cause] for cause in CAUSES},
            "age_at_eviction_seconds": self.ages.spread(),
        }


def readings(stats: dict[str, Any], counts: Counts) -> Readings:
    """Return the numbers of `proteus_pipeline.ModelCacheManager.get_cache_stats` as metrics.

    Parameters
    ----------
    stats
        What it returned.
    counts
        For the histograms.

    """
    from importlib.metadata import version

    made = Readings(SERVICE)
    made.set("proteus_build_info", 1, version=version("proteus_pipeline"))
    for result in ("hit", "miss"):
        made.set(
            "proteus_cache_requests_total", stats["hits" if result == "hit" else "misses"], cache=MODELS, result=result
        )
    for source, number in (("weights", stats["loads"]), ("compressed", stats["restored"])):
        made.set("proteus_cache_loads_total", number, cache=MODELS, source=source)
    made.set("proteus_cache_load_failures_total", stats["load_failures"], cache=MODELS)
    for cause, number in stats["evictions"].items():
        made.set("proteus_cache_evictions_total", number, cache=MODELS, cause=cause)
    made.set("proteus_cache_leases", stats["leases"], cache=MODELS)
    made.set(_LOAD, counts.load_seconds.all, cache=MODELS)
    made.set(_AGE, counts.ages.all, cache=MODELS)
    for device, of in stats["devices"].items():
        made.set("proteus_cache_limit_bytes", of["limit_bytes"], cache=MODELS, device=device)
        for name, number in of.items():
            if name != "limit_bytes":
                kind = name.removesuffix("_bytes")
                made.set("proteus_cache_bytes", number, cache=MODELS, device=device, kind=kind)
    return made
