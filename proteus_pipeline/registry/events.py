"""Tags are events, and what is true of a model is a fold over them.

========================= ======================================================================
tag (GTO's grammar)       event
========================= ======================================================================
``NAME@v1.2.3``           registered
``NAME@v1.2.3!``          deleted; ``NAME@v1.2.3!#N`` where it was deleted before
``NAME#current#N``        the version at the tag's commit became current (a rollback, or forward again)
========================= ======================================================================

Nothing is ever removed: a later event says otherwise. Pure: no git here, only what ``for-each-ref`` printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import semver

from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.identity.names import Version
from proteus_pipeline.registry.records import VersionRecord

_TAG = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9/_-]*[A-Za-z0-9])?)"
    r"(?:@v(?P<version>\d[0-9A-Za-z.+-]*)(?P<cancel>!?)|#(?P<stage>current))(?:#(?P<count>\d+))?"
)


@dataclass(frozen=True)
class Event:
    """One tag.

    Attributes
    ----------
    kind
        ``registered``, ``deleted``, or ``made current``.
    version
        The version it is about; None for ``made current``, where the commit says it.
    commit
        The commit the tag points to.
    sequence
        From the tag's record or counter; None where a tag carries neither.
    time
        Seconds since 1970.
    record
        For a registration by this package.
    damage
        Why a registration's record can't be read; the version counts all the same, and nothing stands in for it.

    """

    kind: str
    name: str
    version: str | None
    tag: str
    commit: str
    time: int
    author: str = ""
    sequence: int | None = None
    record: VersionRecord | None = None
    damage: IntegrityError | None = None


@dataclass(frozen=True)
class History:
    """A model's events in order, and what they come to.

    Attributes
    ----------
    live
        Registered and not deleted, by version, in SemVer order.
    current
        The version that ``NAME`` and ``NAME@current`` mean, or None.

    """

    name: str
    events: tuple[Event, ...]
    live: dict[str, Event]
    current: str | None


def parse_tag(tag: str) -> tuple[str, str, str | None, int | None] | None:
    """Return (kind, name, version, counter) of a tag, or None for a tag of another kind.

    >>> parse_tag("esm2@v1.0.0"), parse_tag("esm2#current#3"), parse_tag("v1.0")
    (('registered', 'esm2', '1.0.0', None), ('made current', 'esm2', None, 3), None)
    """
    found = _TAG.fullmatch(tag)
    if not found or (found["version"] and not semver.Version.is_valid(found["version"])):
        return None
    count = int(found["count"]) if found["count"] else None
    if found["stage"]:
        return ("made current", found["name"], None, count) if count is not None else None
    return "deleted" if found["cancel"] else "registered", found["name"], found["version"], count


def fold(name: str, events: Iterable[Event]) -> History:
    """Put a model's events in order, and return what they come to.

    A release becomes current on registration when it is greater than the current version, or the current version is a
    pre-release, so that neither a back-port nor a pre-release displaces a release; a ``made current`` event decides by
    itself; deleting the current version leaves the greatest live release.
    """
    ordered = _in_order(list(events))
    live: dict[str, Event] = {}
    current: str | None = None
    for event in ordered:
        if event.kind == "registered" and event.version:
            live.setdefault(event.version, event)
            version = Version(event.version)
            if current is None or (not version.semver.prerelease and _displaces(version, Version(current))):
                current = event.version
        elif event.kind == "deleted" and event.version:
            live.pop(event.version, None)
            if current == event.version:
                current = greatest(live)
        else:
            at = [v for v, registered in live.items() if registered.commit == event.commit]
            current = at[0] if at else current
    by_version = dict(sorted(live.items(), key=lambda item: Version(item[0])))
    return History(name, tuple(ordered), by_version, current)


def _displaces(release: Version, current: Version) -> bool:
    """Say whether a new release becomes current: it is greater, or what is current was never released."""
    return bool(current.semver.prerelease) or release > current


def greatest(versions: Iterable[str]) -> str | None:
    """Return the greatest release, or the greatest pre-release where there is no release."""
    parsed = [Version(v) for v in versions]
    best = max((v for v in parsed if not v.semver.prerelease), default=max(parsed, default=None))
    return best.text if best else None


def _in_order(events: list[Event]) -> list[Event]:
    """Sort by sequence number; a tag without one comes after the numbered events that are not younger than it.

    Clocks of two machines differ, and a version is deleted after it was registered all the same.
    """
    numbered = [e for e in events if e.sequence is not None]
    registered: dict[str | None, int] = {}
    for event in events:
        if event.kind == "registered":
            registered[event.version] = min(event.time, registered.get(event.version, event.time))

    def place(event: Event) -> tuple[float, int, str]:
        if event.sequence is not None:
            return (event.sequence, event.time, event.tag)
        time = max(event.time, registered.get(event.version, 0)) if event.kind == "deleted" else event.time
        before = [e.sequence for e in numbered if e.sequence is not None and e.time <= time]
        return (max(before, default=0) + 0.5, time, event.tag)

    return sorted(events, key=place)
