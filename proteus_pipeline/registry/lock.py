"""models.lock: what each floating reference meant, so that an old commit always means the versions it meant then.

::

    # What floating references mean. Written by `proteus model lock`.
    schema: 1
    references:
      esm2@latest:
        version: 1.0.1
        model: 418e...
        trunk: e074...
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from proteus_pipeline.errors import ConfigError, InvalidVersionError, StaleLockError
from proteus_pipeline.identity.names import Reference
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.stores.files import write_atomic

if TYPE_CHECKING:
    from proteus_pipeline.registry.versions import ModelVersionManager

SCHEMA = 1
_HEADER = "# What floating references mean. Written by `proteus model lock`; commit it.\n"


@dataclass(frozen=True)
class Locked:
    """One floating reference's meaning: a version, and its model and trunk digests."""

    version: str
    model: str
    trunk: str

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) for value in astuple(self)):
            raise TypeError("version, model and trunk are texts")

    @classmethod
    def of(cls, version: ModelVersion) -> Locked:
        record = version.record
        if record is None:
            return cls(version.version, version.checkpoint.model_digest, version.checkpoint.trunk_digest)
        return cls(version.version, record.model_digest, record.trunk_digest)


def read_lock(path: Path) -> dict[str, Locked]:
    """Return what is locked, by reference as `Reference` writes it; a missing file locks nothing.

    Raises
    ------
    ConfigError
        When the file is no lock, or of another schema.

    """
    if not path.exists():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if value.get("schema") != SCHEMA:
            raise ConfigError(
                f"{path} has schema {value.get('schema')!r}, and this proteus reads {SCHEMA}", "git checkout it"
            )
        locked = {str(Reference.parse(text)): Locked(**entry) for text, entry in (value["references"] or {}).items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError, InvalidVersionError) as error:
        raise ConfigError(f"{path} is damaged ({error})", "git checkout it, or: proteus model lock --update") from error
    return locked


def write_lock(path: Path, locked: dict[str, Locked]) -> None:
    """Write the file, sorted by reference; the same bytes for the same meanings."""
    references = {reference: asdict(entry) for reference, entry in sorted(locked.items())}
    body = yaml.safe_dump({"schema": SCHEMA, "references": references}, sort_keys=False, allow_unicode=True)
    write_atomic(path, (_HEADER + body).encode())


def resolve_locked(
    manager: ModelVersionManager, reference: str, locked: dict[str, Locked], remedy: str = ""
) -> ModelVersion:
    """Return the version an exact reference names, or the one a floating reference is locked to.

    Parameters
    ----------
    manager
        Where versions are.
    reference
        The reference.
    locked
        What `read_lock` gives.
    remedy
        What to do about a floating reference that is not locked, where ``proteus model lock`` is not it.

    Raises
    ------
    StaleLockError
        When a floating reference is not locked, or its version has other weights than the lock says.

    """
    wanted = Reference.parse(reference)
    if wanted.exact:
        return manager.get_version(wanted.name, wanted.selector)
    entry = locked.get(str(wanted))
    if entry is None:
        raise StaleLockError(
            f"{wanted} is a floating reference that models.lock does not hold", remedy or "run: proteus model lock"
        )
    version = manager.get_version(wanted.name, entry.version)
    if Locked.of(version) != entry:
        raise StaleLockError(
            f"models.lock says that {wanted} is v{entry.version} with digest {entry.model}, and that version has another",
            "find out who moved the tag, then: proteus model lock --update",
        )
    return version
