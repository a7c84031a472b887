"""What a model cache counts, and how it is told: as a mapping, and as Prometheus reads it."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

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


def prometheus_text(stats: dict[str, Any]) -> str:
    """Return the numbers of `proteus_pipeline.ModelCacheManager.get_cache_stats` in Prometheus's text format, version 0.0.4.

    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    lines: list[str] = []

    def metric(name: str, kind: str, text: str, samples: list[tuple[dict[str, str], float | None]]) -> None:
        known = [(labels, value) for labels, value in samples if value is not None]
        if known:
            lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))
        for labels, value in known:
            given = ",".join(f'{label}="{v}"' for label, v in ({"cache": "model"} | labels).items())
            lines.append(f"{name}{{{given}}} {value}")

    requests = [({"result": result}, stats[of]) for result, of in (("hit", "hits"), ("miss", "misses"))]
    metric("proteus_cache_requests_total", "counter", "Requests for a loaded model.", requests)
    loads = [({"source": s}, stats[of]) for s, of in (("weights", "loads"), ("compressed", "restored"))]
    metric("proteus_cache_loads_total", "counter", "Models loaded.", loads)
    metric("proteus_cache_load_failures_total", "counter", "Loads that failed.", [({}, stats["load_failures"])])
    evictions = [({"cause": cause}, count) for cause, count in stats["evictions"].items()]
    metric("proteus_cache_evictions_total", "counter", "Models let go, by cause.", evictions)
    kinds = ("models", "loading", "freeing", "compressed")
    devices = stats["devices"].items()
    held = [({"device": d, "kind": kind}, of[f"{kind}_bytes"]) for d, of in devices for kind in kinds]
    metric("proteus_cache_bytes", "gauge", "Bytes that count against the limit.", held)
    limits = [({"device": d}, of["limit_bytes"]) for d, of in devices]
    metric("proteus_cache_limit_bytes", "gauge", "Bytes that there may be.", limits)
    metric("proteus_cache_leases", "gauge", "Leases that are held.", [({}, stats["leases"])])
    for name, text in (("load_seconds", "Seconds a load took."), ("age_at_eviction_seconds", "Age of a model let go.")):
        spread = [({"quantile": f"0.{p[1:]}"}, value) for p, value in stats[name].items()]
        metric(f"proteus_cache_{name}", "gauge", text, spread)
    return "\n".join(lines) + "\n"
