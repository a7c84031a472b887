"""What happened to entries after they were published: files of their own, since segments and indexes never change.

An event hides entries from every reader from the moment that its file appears:

``invalidated``
    All entries of some weights, or of some weights by some recipes, that were published before it.
``quarantined``
    Entries that were found damaged; their bytes stay for whoever wants to look.
``retired``
    Whole segments: evicted or unreachable, whose files go at once; or written again, whose files stay for a while, since
    a reader may be about to read them.
"""

from __future__ import annotations

import getpass
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings.index import known_fields
from proteus_pipeline.embeddings.keys import key_array
from proteus_pipeline.errors import FormatError, IntegrityError
from proteus_pipeline.identity import digests

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.index import SegmentHeader
    from proteus_pipeline.stores.store import Store

FORMAT = 1
FOLDER = "events"
KINDS = ("invalidated", "quarantined", "retired")


@dataclass(frozen=True)
class CacheEvent:
    """One event.

    Attributes
    ----------
    kind
        ``invalidated``, ``quarantined`` or ``retired``.
    time
        Nanoseconds since 1970.
    by, reason
        Who, and why.
    trunk, recipe
        Of what is invalidated: all recipes that agree in the fields that are given.
    segments
        What is retired; what is quarantined, with the keys there.

    """

    kind: str
    time: int
    by: str
    reason: str
    trunk: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    segments: dict[str, list[str]] = field(default_factory=dict)

    def hides(self, header: SegmentHeader) -> bool:
        """Say whether a whole segment is hidden by this."""
        if self.kind == "retired":
            return header.segment in self.segments
        return header.published < self.time and self.invalidates(header.trunk, header.recipe)

    def invalidates(self, trunk: str, recipe: Mapping[str, Any]) -> bool:
        """Say whether this is about embeddings by some weights and a recipe, those that are older than it."""
        if self.kind != "invalidated" or trunk != self.trunk:
            return False
        return all(recipe.get(name) == value for name, value in self.recipe.items())


def make_event(kind: str, reason: str, *, after: int = 0, **what: Any) -> CacheEvent:
    """Return an event of now, by this user; later than `after`, whatever this machine's clock says."""
    return CacheEvent(kind, max(time.time_ns(), after + 1), _user(), reason, **what)


def write_event(store: Store, event: CacheEvent) -> str:
    """Write an event; when this returns, readers honour it.

    Raises
    ------
    StorageError
        When it can't be written.

    """
    value = asdict(event) | {"format": FORMAT}
    text = json.dumps(value | {"checksum": _checksum(value)}, sort_keys=True).encode()
    name = f"{FOLDER}/{event.time:020d}-{secrets.token_hex(6)}.json"
    store.write(name, text)
    return name


def event_files(store: Store) -> set[str]:
    """Return the names of the events in a store, as `read_event` takes them."""
    return {f"{FOLDER}/{name}" for name in store.names(FOLDER) if name.endswith(".json")}


def read_event(store: Store, name: str) -> CacheEvent:
    """Read an event.

    Raises
    ------
    IntegrityError
        When it is damaged, or of another format: what it hides is not known.
    FileNotFoundError
        When it is gone.

    """
    where = f"{store.location}/{name}"
    try:
        value = json.loads(store.read(name))
        sound = value.pop("checksum") == _checksum(value)
        known = value.pop("format") == FORMAT and value["kind"] in KINDS
        event = CacheEvent(**known_fields(CacheEvent, value)) if sound and known else None
        if event is not None:
            _check(event)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound, known, event = False, False, None
    if event is None and sound and not known:
        raise FormatError(f"{where} is of a later format", "upgrade proteus_pipeline")
    if event is None:
        raise IntegrityError(
            f"{where} is damaged, and which entries it hides is not known",
            "bring it back from a copy of the cache, or remove it to have them shown again",
        )
    return event


def _check(event: CacheEvent) -> None:
    """Make sure that an event is one, wherever it comes from."""
    texts = (event.kind, event.by, event.reason, event.trunk, *event.segments)
    if type(event.time) is not int or not 0 <= event.time < 1 << 63 or not all(isinstance(t, str) for t in texts):
        raise ValueError("its fields are of other types")
    event.recipe.keys()
    key_array([key for keys in event.segments.values() for key in keys])


def _checksum(value: dict[str, Any]) -> str:
    return digests.of_bytes(json.dumps(value, sort_keys=True).encode())


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id: in a container
        return "unknown"
