"""The repository's tags, read as events by one git process."""

from __future__ import annotations

from collections.abc import Iterator

from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.registry.events import Event, parse_tag
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.records import EventRecord, VersionRecord, read_event, read_record

# NUL ends each field: no ref name, number or header line that git prints holds one. The message, which holds whatever
# its author likes, comes last and is taken by its length in bytes, so that no message can pass for another tag.
_FIELDS = ("refname:strip=2", "*objectname", "objectname", "creatordate:unix", "taggername", "contents:size")
_FORMAT = "".join(f"%({field})%00" for field in _FIELDS) + "%(contents)"


def read_events(git: Git, name: str | None = None) -> list[Event]:
    """Return the events of one model, or of all; a record that can't be read is its event's `damage`."""
    patterns = (f"refs/tags/{name}@v*", f"refs/tags/{name}#*") if name else ("refs/tags/",)
    events = []
    for (tag, peeled, plain, time, author), message in _split(
        git.run_bytes("for-each-ref", f"--format={_FORMAT}", *patterns)
    ):
        parsed = parse_tag(tag)
        if parsed is None or name not in {None, parsed[1]}:
            continue
        kind, model, version, counter = parsed
        record, told, damage = _read(message, tag)
        if kind == "registered" and counter is not None:
            kind = "adopted" if record else "restored"
        if told and told.event != kind:
            damage = IntegrityError(f"tag {tag} says {told.event!r}", "fetch it again from a remote")
            told = None
        version = told.version if told else version
        sequence = record.sequence if record else told.sequence if told else None
        if sequence is None and kind == "made current":
            sequence = counter
        stamp = int(time) if time.isdecimal() else 0
        events.append(
            Event(kind, model, version, tag, peeled or plain, stamp, author, sequence, record, damage, plain, told)
        )
    return events


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
