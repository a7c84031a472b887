"""What happens to a registered version, as a tag: deleted, restored, made current."""

from __future__ import annotations

import datetime
import secrets
import time
from collections.abc import Mapping
from typing import Any

from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.registry.events import Event, History
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.records import SEQUENCES, EventRecord, json_like
from proteus_pipeline.registry.refs import LEDGER, publish

_SIGNS = {"made current": "#", "deleted": "!#", "restored": "%"}


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
    subject = f"{history.name}#current" if event == "made current" else f"{history.name}@v{number}"
    tag = f"{subject}{_SIGNS[event]}{counter(sequence)}"
    record = EventRecord(event, history.name, number, sequence, author(git), now_text(), reason, dict(details or {}))
    tags = {tag: git.make_tag(tag, version.commit, record.message(), tag_time(history, event, number))}
    withdrawn = _deletions(git, history, number) if event == "restored" else {}
    for oid in withdrawn.values():
        while (name := f"{subject}%{counter(sequence)}") in tags:
            continue
        tags[name] = oid
    if not publish(git, tags, withdrawn=withdrawn):
        raise StorageError(f"tag {tag} was made meanwhile", "run the command again")
    return tag


def counter(sequence: int) -> str:
    """Return the last part of a tag's name: two clones may each make an event of the same number.

    Raises
    ------
    IntegrityError
        When there are more events than names for them, as only a forged record makes it.

    """
    if sequence >= SEQUENCES:
        raise IntegrityError(
            f"a tag says that it is event {sequence - 1}", "look for it: proteus model history NAME --json"
        )
    return f"{sequence}{secrets.randbelow(1_000_000):06d}"


def _deletions(git: Git, history: History, number: str) -> dict[str, str]:
    """Return a version's deletions by the names that gto reads, with their tag objects."""
    tags = [e.tag for e in history.events if e.kind == "deleted" and e.version == number and "!" in e.tag]
    found = git.read_objects([f"refs/tags/{tag}" for tag in tags])
    entered = git.ids([f"{LEDGER}{tag}" for tag in tags])
    for tag, made, oid in zip(tags, found, entered, strict=True):
        if oid and made and made.oid != oid:
            raise IntegrityError(f"tag {tag} was moved or edited", "proteus model verify --repair puts it back")
    # Without an object of its own, a tag has nothing to keep, and gto does not read it.
    return {tag: made.oid for tag, made in zip(tags, found, strict=True) if made and made.kind == "tag"}
