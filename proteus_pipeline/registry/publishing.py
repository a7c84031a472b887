"""What happens to a registered version, as a tag: deleted, restored, made current."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import Any

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.events import Event, History
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.records import EventRecord, json_like
from proteus_pipeline.registry.refs import publish


def now_text() -> str:
    """Return the time as a record holds it: ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def author(git: Git) -> dict[str, Any]:
    """Return who acts, as a record holds it."""
    who = git.identity()
    return {"name": who.name, "email": who.email, "fallback": who.fallback}


def tag_time(history: History, event: str, number: str) -> int:
    """Return the time for a tag: later than what it answers to, since gto orders a version's events by their time."""
    if event == "made current":
        before = [e.time for e in history.events if e.kind == event]
    else:
        before = [e.time for e in history.events if e.version == number]
    return max([int(time.time()), *(1 + t for t in before)])


def publish_event(
    git: Git,
    history: History,
    event: str,
    version: Event,
    *,
    reason: str = "",
    details: Mapping[str, Any] | None = None,
) -> str:
    """Publish what happened to a version, at its commit, and return the tag; within `exclusive`.

    Parameters
    ----------
    event
        ``deleted``, ``restored`` or ``made current``.
    version
        The event of its registration.

    Raises
    ------
    StorageError
        When git can't write it, or has a tag of that name already.

    """
    json_like({"reason": reason}, "reason")
    number, sequence = str(version.version), history.next_sequence
    tag = _tag(history, event, number, sequence)
    record = EventRecord(event, history.name, number, sequence, author(git), now_text(), reason, dict(details or {}))
    oid = git.make_tag(tag, version.commit, record.message(), tag_time(history, event, number))
    if not publish(git, {tag: oid}):
        raise StorageError(f"tag {tag} was made meanwhile", "run the command again")
    return tag


def _tag(history: History, event: str, number: str, sequence: int) -> str:
    if event == "made current":
        return f"{history.name}#current#{sequence}"
    tag = f"{history.name}@v{number}" + ("!" if event == "deleted" else "")
    if event == "deleted" and all(e.tag != tag for e in history.events):
        return tag
    return f"{tag}#{sequence}"
