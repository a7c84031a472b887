"""What a page says that is no part of the result: the run, the versions and the cache as they stand when it is written.

It differs from run to run, so that nothing of it may be in a stage's output.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings.housekeeping import EVICTED, REWRITTEN
from proteus_pipeline.stages.caching import contents
from proteus_pipeline.stages.project import STAGES

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.events import CacheEvent
    from proteus_pipeline.registry.events import Event, History
    from proteus_pipeline.stages.project import Project

# Of a model's events, of a cache's, and of live versions beside those in use, so many are shown: the latest.
MOST_EVENTS = 50
MOST_VERSIONS = 30
MOST_KINDS = 30


@dataclass(frozen=True)
class StageRun:
    """What results/run.json says of one stage.

    Attributes
    ----------
    name
        The stage's.
    status
        ``run`` or ``unchanged``.
    counts
        ``sequences``, ``unique``, ``hits``, ``derived``, ``computed``; empty for a stage that embeds nothing.
    elapsed
        What the stage took, in seconds; 0 where it did not run.
    seconds, saved_seconds, gpu_seconds, saved_gpu_seconds
        Spent on embedding, and what the hits took when they were computed; in all, and on a GPU.
    device_class
        Where it computed; empty where it computed nothing.
    misses
        How many it computed for which reason.
    missed
        Of those, ``id``, ``differs``, ``nearest`` and ``detail`` of the first.
    other_classes
        How many hits were attested by which device class, where it was not that of the machine that ran it.

    """

    name: str
    status: str
    counts: Mapping[str, int] = field(default_factory=dict)
    elapsed: float = 0.0
    seconds: float = 0.0
    saved_seconds: float = 0.0
    gpu_seconds: float = 0.0
    saved_gpu_seconds: float = 0.0
    device_class: str = ""
    misses: Mapping[str, int] = field(default_factory=dict)
    missed: Sequence[Mapping[str, Any]] = ()
    other_classes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """One event of a model, or of the cache.

    Attributes
    ----------
    time
        ISO 8601 in UTC, to the second.
    kind, about
        What happened, to what.
    by, reason
        Who, and why.
    current
        The version that was current afterwards; None for none.
    damage
        Why the event's record can't be read; empty where it can.

    """

    time: str
    kind: str
    about: str
    by: str = ""
    reason: str = ""
    current: str | None = None
    damage: str = ""


@dataclass(frozen=True)
class VersionRow:
    """A live version: who uses it in this run, and what its record says."""

    number: str
    current: bool
    used_by: str
    registered: str
    model_digest: str
    trunk_digest: str
    nbytes: int | None
    reason: str


@dataclass(frozen=True)
class ModelHistory:
    """A model's latest live versions in SemVer order, and its latest events, the latest first; of how many of each."""

    name: str
    current: str | None
    versions: Sequence[VersionRow]
    live: int
    moments: Sequence[Moment]
    events: int


@dataclass(frozen=True)
class CacheState:
    """What the cache has.

    Attributes
    ----------
    stats
        `EmbeddingCache.stats`.
    max_bytes, policy
        Its budget, None for none, and what it evicts first.
    kinds
        By weights and recipe: the recipe, the versions that have these weights, entries, bytes, time of the last use.
    evictions
        How many segments were ever evicted.
    moments
        Evictions, removals, invalidations and quarantines, the latest first.

    """

    stats: Mapping[str, int]
    max_bytes: int | None
    policy: str
    kinds: Sequence[tuple[Mapping[str, Any], str, int, int, str]]
    evictions: int
    moments: Sequence[Moment]


@dataclass(frozen=True)
class Standing:
    """All of it.

    Attributes
    ----------
    commit, dirty
        HEAD's commit id when the run ended, and whether tracked files differed from it; None before the first commit.
    finished, seconds
        When the run's last stage ended, and what the run took in all; empty and None where that is not recorded.
    packages
        Versions of the packages that ran.
    runs
        Stage by stage; none where there was no run yet.
    models
        Those that the run uses.
    others
        The other models' names and current versions.
    cache
        As it is now.

    """

    commit: str | None
    dirty: bool | None
    finished: str
    seconds: float | None
    packages: Mapping[str, str]
    runs: Sequence[StageRun]
    models: Sequence[ModelHistory]
    others: Sequence[tuple[str, str | None]]
    cache: CacheState


def standing(here: Project) -> Standing:
    """Return what is true of a project now.

    Raises
    ------
    StorageError
        When the registry or the cache can't be read.

    """
    composed, log = here.composed, here.run_log()
    commit = _mapping(log.get("commit"))
    used: dict[str, dict[str, list[str]]] = {}
    for stage, own in composed["stages"].items():
        if (model := own["model"])["reference"]:
            used.setdefault(model["name"], {}).setdefault(model["version"], []).append(stage)
    histories = here.manager.histories()
    sections = _mapping(log.get("stages"))
    runs = [_run(name, sections[name]) for name in STAGES if name in sections]
    seconds = log.get("seconds")
    return Standing(
        commit=commit.get("id"),
        dirty=commit.get("dirty"),
        finished=max((str(_mapping(s).get("finished", "")) for s in sections.values()), default=""),
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        packages={str(name): str(version) for name, version in _mapping(log.get("packages")).items()},
        runs=runs,
        models=[_history(h, used[h.name]) for h in histories if h.name in used],
        others=[(h.name, h.current) for h in histories if h.name not in used and h.live][:MOST_KINDS],
        cache=_cache(here, composed),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    """Return what should be a mapping of results/run.json, which people can edit; an empty one where it is none."""
    return value if isinstance(value, dict) else {}


def _run(name: str, section: object) -> StageRun:
    facts = _mapping(section)

    def amount(key: str) -> float:
        value = facts.get(key)
        return value if isinstance(value, int | float) else 0

    fields = ("sequences", "unique", "hits", "derived", "computed")
    missed = facts.get("missed")
    return StageRun(
        name,
        str(facts.get("status", "")),
        {key: int(amount(key)) for key in fields} if "computed" in facts and facts.get("model") else {},
        amount("elapsed"),
        amount("seconds"),
        amount("saved_seconds"),
        amount("gpu_seconds"),
        amount("saved_gpu_seconds"),
        str(facts.get("device_class") or ""),
        _counts(facts.get("misses")),
        [m for m in missed if isinstance(m, dict)] if isinstance(missed, list) else (),
        _counts(facts.get("other_classes")),
    )


def _counts(value: object) -> Mapping[str, int]:
    return {str(of): n for of, n in _mapping(value).items() if isinstance(n, int)}


def _history(history: History, used: Mapping[str, Sequence[str]]) -> ModelHistory:
    commits = {e.commit: v for v, e in history.known.items()}
    told = [
        Moment(
            _time(e.time),
            e.kind,
            f"v{e.version or commits.get(e.commit, '?')}",
            e.author,
            e.reason + (f" (breaks: {e.record.breaking})" if e.record and e.record.breaking else ""),
            current,
            e.damage.what if e.damage else "",
        )
        for e, current in zip(history.events, history.currents, strict=True)
    ]
    latest = set(list(history.live)[-MOST_VERSIONS:]) | {history.current, *used}
    rows = [_version(v, e, history.current, used.get(v, ())) for v, e in history.live.items() if v in latest]
    return ModelHistory(history.name, history.current, rows, len(history.live), told[::-1][:MOST_EVENTS], len(told))


def _version(number: str, event: Event, current: str | None, stages: Sequence[str]) -> VersionRow:
    record = event.record
    return VersionRow(
        number,
        number == current,
        ", ".join(stages),
        _time(event.time),
        record.model_digest if record else "",
        record.trunk_digest if record else "",
        record.size if record else None,
        event.reason,
    )


def _cache(here: Project, composed: Mapping[str, Any]) -> CacheState:
    cache = here.cache(dict(composed))
    stats = cache.stats()
    kinds = [
        (c.recipe, ", ".join(names) or f"trunk {c.trunk[:12]}…", c.entries, c.nbytes, _time(c.used))
        for c, names in contents(here, cache)[:MOST_KINDS]
    ]
    events = sorted(cache.visible.events, key=lambda e: -e.time)
    evicted = [e for e in events if e.kind == "retired" and e.reason.startswith(EVICTED)]
    # What was only written again, in a larger segment, is still there.
    shown = [e for e in events if e.kind != "retired" or not e.reason.startswith(REWRITTEN)]
    return CacheState(
        stats,
        composed["cache"]["max_bytes"],
        composed["cache"]["policy"],
        kinds,
        sum(len(e.segments) for e in evicted),
        [_cache_moment(e) for e in shown[:MOST_EVENTS]],
    )


def _cache_moment(event: CacheEvent) -> Moment:
    removed = "evicted" if event.reason.startswith(EVICTED) else "removed"
    kind = removed if event.kind == "retired" else event.kind
    count = len(event.segments)
    about = f"{count} segment{'s' * (count != 1)}" if count else f"trunk {event.trunk[:12]}…"
    return Moment(_time(event.time / 1e9), kind, about, event.by, event.reason)


def _time(when: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(when, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return ""  # a clock that nobody ever had
