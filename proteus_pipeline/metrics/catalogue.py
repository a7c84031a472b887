"""Every metric there is: its name, type, labels and meaning. docs/monitoring.md is held to this by a test."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

MONITOR, SERVICE = "monitor", "service"
"""Where a metric is shown: by ``proteus monitor``, and by a process that serves models (`ModelCacheManager.prometheus`)."""
EMBEDDINGS, MODELS, SHARED, REDIS = "embeddings", "models", "shared", "redis"
"""Caches; of the last two, which others share, what this project asked of them."""
RESULTS = ("hit", "miss")
SHARED_RESULTS = (*RESULTS, "failed")
REDIS_RESULTS = (*SHARED_RESULTS, "refused")
CAUSES = ("room", "shrunk", "expired", "invalidated", "cleared")
"""Why a model is let go."""
CODES = ("1", "2", "3", "4", "5")
"""Exit codes: an error, a wrong setting, drift or stale, integrity, conflict."""
SOURCES = ("weights", "compressed")
# A load takes milliseconds for the smallest model, minutes for the largest on a slow disk.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_AGES = (1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes
    ----------
    name
        As it is shown: a counter's ends in ``_total``.
    kind
        ``counter``, ``gauge`` or ``histogram``.
    text
        What it means.
    labels
        Their names.
    known
        Values of the labels that processes count under; they are shown from the start, as 0 where nothing was counted: a
        counter that first appears with its first event has no rate. What is read from tags, events and files is not in here:
        where it can't be read it is absent, and not 0.
    buckets
        Upper bounds of a histogram's, without infinity.
    shown
        `MONITOR`, `SERVICE`, or both.

    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()
    buckets: tuple[float, ...] = ()
    shown: tuple[str, ...] = (MONITOR,)

    @property
    def unit(self) -> str:
        """``bytes`` or ``seconds``, as the name says; empty for a number of things."""
        bare = self.name.removesuffix("_total")
        return next((unit for unit in ("bytes", "seconds") if bare.endswith(f"_{unit}")), "")


def _version(name: str, text: str, kind: str = "counter", known: tuple[tuple[str, ...], ...] = ()) -> Metric:
    return Metric(f"proteus_version_{name}", kind, text, known=known)


_BOTH = (MONITOR, SERVICE)
_CACHES = ((EMBEDDINGS,), (MODELS,))

_ALL = (
    _version("registrations_total", "Versions registered."),
    _version(
        "conflicts_total",
        "Registrations refused, since the version exists with other content or was deleted.",
        known=((),),
    ),
    _version("rollbacks_total", "Times that a version was made current, back or forward."),
    _version("deletions_total", "Versions deleted."),
    _version("restorations_total", "Deleted versions brought back."),
    _version("adoptions_total", "Versions of other tools that were given a record."),
    _version("last_registration_timestamp_seconds", "When the newest version was registered; absent before.", "gauge"),
    _version("storage_bytes", "Bytes of the live versions' weights here; what versions share counts once.", "gauge"),
    _version("backup_bytes", "Bytes of the backups of deleted versions.", "gauge"),
    Metric("proteus_models", "gauge", "Models that have a live version."),
    Metric("proteus_versions", "gauge", "Live versions."),
    Metric(
        "proteus_cache_requests_total",
        "counter",
        "Look-ups: stored or loaded (hit), computed from what is stored (derived), or neither (miss); of a cache that is shared "
        "also could not be asked (failed), or had what is not used (refused).",
        ("cache", "result"),
        (
            *product((MODELS,), RESULTS),
            *product((SHARED,), SHARED_RESULTS),
            *product((REDIS,), REDIS_RESULTS),
        ),
        shown=_BOTH,
    ),
    Metric(
        "proteus_cache_fetched_bytes_total",
        "counter",
        "Bytes that came from a bucket or from Redis.",
        ("cache",),
        ((SHARED,), (REDIS,)),
    ),
    Metric(
        "proteus_cache_sent_bytes_total",
        "counter",
        "Bytes that went to a bucket or to Redis.",
        ("cache",),
        ((SHARED,), (REDIS,)),
    ),
    Metric(
        "proteus_cache_evictions_total",
        "counter",
        "Segments of embeddings, or loaded models, that were let go.",
        ("cache", "cause"),
        tuple((MODELS, cause) for cause in CAUSES),
        shown=_BOTH,
    ),
    Metric(
        "proteus_cache_bytes",
        "gauge",
        "Bytes that count against the limit: on disk, or in the memory of a device.",
        ("cache", "device", "kind"),
        shown=_BOTH,
    ),
    Metric(
        "proteus_cache_limit_bytes",
        "gauge",
        "Bytes that there may be; absent where there is no limit.",
        ("cache", "device"),
        shown=_BOTH,
    ),
    Metric(
        "proteus_cache_leases",
        "gauge",
        "Runs that hold segments of embeddings; leases of loaded models.",
        ("cache",),
        shown=_BOTH,
    ),
    Metric("proteus_cache_entries", "gauge", "Embeddings that can be read.", ("cache",)),
    Metric("proteus_cache_segments", "gauge", "Segments that hold them.", ("cache",)),
    Metric("proteus_cache_invalidations_total", "counter", "Invalidations of embeddings.", ("cache",)),
    Metric(
        "proteus_cache_load_seconds",
        "histogram",
        "Seconds: of reading one run's stored embeddings, or of loading one model.",
        ("cache",),
        _CACHES,
        _SECONDS,
        _BOTH,
    ),
    Metric(
        "proteus_cache_loads_total",
        "counter",
        "Models loaded, from their weights or from a compressed copy.",
        ("cache", "source"),
        tuple(product((MODELS,), SOURCES)),
        shown=_BOTH,
    ),
    Metric("proteus_cache_load_failures_total", "counter", "Loads that failed.", ("cache",), ((MODELS,),), shown=_BOTH),
    Metric(
        "proteus_cache_eviction_age_seconds",
        "histogram",
        "How long a model that was let go had been loaded.",
        ("cache",),
        ((MODELS,),),
        _AGES,
        _BOTH,
    ),
    Metric("proteus_embedding_tokens_total", "counter", "Tokens computed and stored.", (), ((),)),
    Metric("proteus_embedding_compute_seconds", "histogram", "Seconds of computing one segment.", (), ((),), _SECONDS),
    Metric(
        "proteus_embedding_saved_seconds_total",
        "counter",
        "Seconds that hits and derived hits took when they were computed.",
        (),
        ((),),
    ),
    Metric(
        "proteus_integrity_findings_total",
        "counter",
        "Damage found, each time that it was: by verify, or by a read, which then serves something else.",
        ("of",),
        (("embeddings",), ("versions",)),
    ),
    Metric(
        "proteus_command_errors_total",
        "counter",
        "Commands and stages that ended with an exit code of their own.",
        ("code",),
        tuple((code,) for code in CODES),
    ),
    Metric("proteus_monitor_success", "gauge", "Whether a part of the metrics could be read.", ("part",)),
    Metric("proteus_build_info", "gauge", "The version of this package.", ("version",), shown=_BOTH),
)
CATALOGUE = {metric.name: metric for metric in _ALL}
