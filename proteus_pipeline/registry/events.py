"""Tags are events, and what is true of a model is a fold over them.

========================= ======================================================================
tag                       event
========================= ======================================================================
``NAME@v1.2.3``           registered
``NAME@v1.2.3!#N``        deleted
``NAME#current#N``        the version at the tag's commit became current (a rollback, or forward again)
``NAME@v1.2.3%N``         what GTO's grammar has no word for: restored; adopted (it holds the record of a version that
                          somebody else tagged); or deleted, once a later event restored the version
========================= ======================================================================

The first three are GTO's, which also writes ``NAME@v1.2.3!``, ``NAME#current!#N`` (no longer current) and, to register a
version again, ``NAME@v1.2.3#N``. GTO counts a version as live when its last tag is a registration, and its table fails on
two of them: so a restored version's ``!`` becomes a ``%``, the same tag object under another name. No event is ever
removed. `N` tells the tags of two clones apart: the event's number, and six digits by chance.

Pure: no git here, only what ``for-each-ref`` printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import semver

from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.identity.names import Version
from proteus_pipeline.registry.records import EventRecord, VersionRecord

_TAG = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9/_-]*[A-Za-z0-9])?)"
    r"(?:@v(?P<version>\d[0-9A-Za-z.+-]*)(?:(?P<deleted>!)?(?:#(?P<count>\d+))?|%(?P<note>\d+))"
    r"|#(?P<stage>current)(?P<left>!)?#(?P<turn>\d+))"
)

_LONGEST_COUNT = 15  # digits; a number that is longer counts nothing


@dataclass(frozen=True)
class Event:
    """One tag.

    Attributes
    ----------
    kind
        ``registered``, ``adopted``, ``deleted``, ``restored``, ``made current``, ``no longer current`` (gto's alone), or
        ``unknown`` where a ``%`` tag can't be read.
    version
        The version it is about; None for a stage tag of gto's, where the commit says it.
    commit
        The commit the tag points to.
    oid
        The tag's own object.
    sequence
        From the tag's record; None where a tag carries none, and time and counter order it.
    time
        Seconds since 1970.
    record
        For a registration by this package, or an adoption.
    told
        For the other kinds: what this package wrote of it.
    damage
        Why the record can't be read; the event counts all the same, and nothing stands in for what it said.

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
    oid: str = ""
    told: EventRecord | None = None

    @property
    def reason(self) -> str:
        """Why, in its author's words."""
        return self.record.reason if self.record else self.told.reason if self.told else ""


@dataclass(frozen=True)
class History:
    """A model's events in order, and what they come to.

    Attributes
    ----------
    live
        Registered and not deleted, by version, in SemVer order; each the event of its registration, with the record of
        its adoption where it has none of its own.
    known
        All that were ever registered, in the same way.
    current
        The version that ``NAME`` and ``NAME@current`` mean, or None.
    currents
        What was current after each event.

    """

    name: str
    events: tuple[Event, ...]
    live: dict[str, Event]
    current: str | None
    known: dict[str, Event] = field(default_factory=dict)
    currents: tuple[str | None, ...] = ()

    def current_at(self, time: int) -> str | None:
        """Return the version that was current at a time, in seconds since 1970; None before there was any."""
        # By the tags' times, of which later events may have earlier ones: two clocks differ.
        reached = [current for event, current in zip(self.events, self.currents, strict=True) if event.time <= time]
        return reached[-1] if reached else None

    def predecessor(self, number: str | None) -> str | None:
        """Return the live version that a number follows, or the greatest there is: to it a SemVer step is promised."""
        return greatest(v for v in self.live if number is None or Version(v) < Version(number))

    @property
    def next_sequence(self) -> int:
        """The number of the next event."""
        # A damaged record's number is not known: one is left free for each.
        return 1 + max((e.sequence or 0 for e in self.events), default=0) + sum(1 for e in self.events if e.damage)


def parse_tag(tag: str) -> tuple[str, str, str | None, int | None] | None:
    """Return (kind, name, version, counter) of a tag, or None for a tag of another kind.

    What a ``%`` tag says is in the tag: its kind here is ``unknown``.

    >>> parse_tag("esm2@v1.0.0"), parse_tag("esm2#current#3"), parse_tag("v1.0")
    (('registered', 'esm2', '1.0.0', None), ('made current', 'esm2', None, 3), None)
    """
    found = _TAG.fullmatch(tag)
    if not found or (found["version"] and not semver.Version.is_valid(found["version"])):
        return None
    count = found["count"] or found["note"] or found["turn"]
    if count and len(count) > _LONGEST_COUNT:
        return None
    kind = "deleted" if found["deleted"] else "unknown" if found["note"] else "registered"
    if found["stage"]:
        kind = "no longer current" if found["left"] else "made current"
    return kind, found["name"], found["version"], int(count) if count else None


def fold(name: str, events: Iterable[Event]) -> History:
    """Put a model's events in order, and return what they come to.

    A release becomes current on registration when it is greater than the current version, or the current version is a
    pre-release, so that neither a back-port nor a pre-release displaces a release; a ``made current`` event decides by
    itself; deleting the current version, or gto's taking the stage from it, leaves the greatest live release.
    """
    ordered = _in_order(list(events))
    known: dict[str, Event] = {}
    live: dict[str, Event] = {}
    current: str | None = None
    currents = []
    for event in ordered:
        if event.kind in {"registered", "restored"} and event.version:
            known.setdefault(event.version, event)
            if event.version not in live:
                live[event.version] = known[event.version]
                arrives = event.kind == "registered" and _displaces(event.version, current)
                current = event.version if current is None or arrives else current
        elif event.kind == "adopted" and event.version:
            _adopt(event, event.version, known, live)
        elif event.kind == "deleted" and event.version:
            live.pop(event.version, None)
            if current == event.version:
                current = greatest(live)
        elif event.kind in {"made current", "no longer current"}:
            at = [v for v, r in live.items() if (event.version == v if event.version else r.commit == event.commit)]
            if event.kind == "made current":
                current = at[0] if at else current
            elif current in at:
                current = greatest(live)
        currents.append(current)
    # Sorted once: comparing versions is most of what folding costs, and those that live are known.
    known = {number: known[number] for number in sorted(known, key=Version)}
    live = {number: live[number] for number in known if number in live}
    return History(name, tuple(ordered), live, current, known, tuple(currents))


def _adopt(adoption: Event, version: str, known: dict[str, Event], live: dict[str, Event]) -> None:
    """Give a registration that has no readable record the adoption's, if it is of the same commit."""
    registered = known.get(version)
    if registered is None or registered.record is not None or registered.commit != adoption.commit:
        return
    known[version] = replace(registered, record=adoption.record, damage=adoption.damage)
    if version in live:
        live[version] = known[version]


def _displaces(version: str, current: str | None) -> bool:
    """Say whether a new version becomes current: a release that is greater, or after what was never released."""
    new = Version(version)
    if current is None or new.semver.prerelease:
        return current is None
    return bool(Version(current).semver.prerelease) or Version(current) < new


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
        if event.kind in {"registered", "restored"}:
            registered[event.version] = min(event.time, registered.get(event.version, event.time))

    def place(event: Event) -> tuple[float, int, int, str]:
        counter = (parse_tag(event.tag) or (0, 0, 0, None))[3] or 0
        if event.sequence is not None:
            return (event.sequence, event.time, counter, event.tag)
        time = max(event.time, registered.get(event.version, 0)) if event.kind == "deleted" else event.time
        before = [e.sequence for e in numbered if e.sequence is not None and e.time <= time]
        return (max(before, default=0) + 0.5, time, counter, event.tag)

    return sorted(events, key=place)
