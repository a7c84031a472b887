"""The repository's tags, read as events by one git process."""

from __future__ import annotations

from collections.abc import Iterator

from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.registry.events import Event, parse_tag
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.records import EventRecord, VersionRecord, read_event, read_record

# NUL ends each field: no ref name, number or header line that git prints holds one. The message, which holds whatever
# its author likes, comes last and is taken by its length in bytes, so that no message can pass for another tag.
_FIELDS = (
    "refname:strip=2", "objecttype", "type", "object", "objectname", "tag", "creatordate:unix", "taggername",
    "contents:size",
)  # fmt: skip
_FORMAT = "".join(f"%({field})%00" for field in _FIELDS) + "%(contents)"


def read_events(git: Git, name: str | None = None) -> list[Event]:
    """Return the events of one model, or of all; a record that can't be read is its event's `damage`."""
    patterns = (f"refs/tags/{name}@v*", f"refs/tags/{name}#*") if name else ("refs/tags/",)
    printed = list(_split(git.run_bytes("for-each-ref", f"--format={_FORMAT}", *patterns)))
    # A tag of a tag: rare, and git versions differ in how far for-each-ref looks.
    nested = [fields[0] for fields, _ in printed if fields[2] == "tag"]
    peeled = (
        dict(zip(nested, git.ids([f"refs/tags/{tag}^{{commit}}" for tag in nested]), strict=True)) if nested else {}
    )
    events = []
    for (tag, object_kind, target_kind, target, oid, title, time, author), message in printed:
        parsed = parse_tag(tag)
        if parsed is None or name not in {None, parsed[1]}:
            continue
        commit = oid if object_kind == "commit" else target if target_kind == "commit" else peeled.get(tag)
        if commit is None:
            continue  # of a file or a tree: whatever it is for, no version
        kind, model, version, counter = parsed
        record, told, damage = _read(message, tag)
        if kind == "unknown":
            kind = _noted(record, told, title)
        elif kind == "registered" and counter is not None:
            kind = "restored"
        if told and told.event != kind:
            damage = IntegrityError(f"tag {tag} says {told.event!r}", "fetch it again from a remote")
            told = None
        version = told.version if told else version
        sequence = record.sequence if record else told.sequence if told else None
        stamp = int(time) if time.isdecimal() else 0
        events.append(Event(kind, model, version, tag, commit, stamp, author, sequence, record, damage, oid, told))
    # Where a clone fetched a deletion before it was restored, it has the same tag object under both names.
    noted = {(event.oid, event.version) for event in events if "%" in event.tag and event.oid != event.commit}
    return [event for event in events if "!" not in event.tag or (event.oid, event.version) not in noted]


def _noted(record: VersionRecord | None, told: EventRecord | None, title: str) -> str:
    """Return what a ``%`` tag is: what it says, or, of gto's that were renamed, what it was called when it was made."""
    if record:
        return "adopted"
    if told:
        return told.event
    parsed = parse_tag(title)
    return "deleted" if parsed and parsed[0] == "deleted" else "unknown"


def _split(data: bytes) -> Iterator[tuple[list[str], str]]:
    place = 0
    while place < len(data):
        fields = []
        for _ in _FIELDS:
            end = data.find(b"\0", place)
            if end < 0:
                raise StorageError("git for-each-ref printed what this proteus can't read", "update git")
            fields.append(data[place:end].decode("utf-8", "replace"))
            place = end + 1
        # A tag of a file or a tree has no message, and no size of one.
        message = data[place : place + int(fields.pop() or 0)]
        place += len(message) + 1  # the line end after each tag
        yield fields, message.decode("utf-8", "replace")


def _read(message: str, tag: str) -> tuple[VersionRecord | None, EventRecord | None, IntegrityError | None]:
    try:
        return read_record(message, tag), read_event(message, tag), None
    except IntegrityError as error:
        return None, None, error
