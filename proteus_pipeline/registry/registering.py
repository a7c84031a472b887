"""Registering a version: what is checked, measured and refused before its tag is made, and what follows it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from proteus_pipeline.errors import (
    CompatibilityError,
    ConfigError,
    StorageError,
    VersionConflictError,
)
from proteus_pipeline.identity.names import Reference, Version
from proteus_pipeline.registry import retirement
from proteus_pipeline.registry.activity import CONFLICTS
from proteus_pipeline.registry.committing import Registration, clean_branch, follow
from proteus_pipeline.registry.events import History, greatest
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.refs import LEDGER, in_turn, put_back
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.weights import DvcCache

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint
    from proteus_pipeline.registry.compatibility import Compatibility
    from proteus_pipeline.registry.versions import ModelVersionManager

BUMPS = ("auto", "major", "minor", "patch")
_log = logging.getLogger(__name__)


class RegistrableModel(Protocol):
    """What `ModelVersionManager.register_version` needs of a model: a name, and weights to read."""

    @property
    def name(self) -> str: ...

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def source(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Request:
    """What `ModelVersionManager.register_version` was asked for, in its own words, checked for form.

    Attributes
    ----------
    number
        The version, or None with a `bump`.
    metadata
        As it comes back from a record; None where none was given, which conflicts with nothing.
    stored
        Pointer, and a record's words of it, where the weights are in the DVC cache already.

    """

    name: str
    number: str | None
    bump: str | None
    metadata: Mapping[str, Any] | None
    configuration: Mapping[str, Any]
    dependencies: Sequence[str]
    reason: str
    breaking: str
    tolerance: float | None
    on_branch: bool
    stored: tuple[Pointer, dict[str, Any]] | None = None


def register(manager: ModelVersionManager, request: Request, model: RegistrableModel) -> ModelVersion:
    """Register a version; see `ModelVersionManager.register_version`."""
    name, number = request.name, request.number
    # What can be wrong without reading gigabytes comes first.
    dependencies = _dependencies(manager, request)
    git, history = manager.ensure_home(), manager.history(name)
    if not history.known:
        _refuse_nested(manager, name)
    checkpoint = model.checkpoint
    if number in history.known:
        return _same_or_conflict(manager, request, str(number), checkpoint)
    if request.bump and (there := _made_before(manager, history, request, checkpoint)):
        return there
    given: dict[str, Any] = {"source": dict(model.source), "metadata": request.metadata or {}}
    given |= {"reason": request.reason, "breaking": request.breaking, "configuration": request.configuration}
    given["dependencies"] = dependencies
    tolerance = _declared_tolerance(history, request)
    given["compatibility"] = {} if tolerance is None else {"tolerance": tolerance, "declared": True}
    measured, before = None, history.predecessor(number)
    if before and (request.bump or tolerance is not None):
        measured = _measure(manager, history, before, checkpoint, tolerance)
        given["compatibility"] = measured.to_record() | {"with": before, "declared": tolerance is not None}
        _allow(history, request, before, measured)
    branch = clean_branch(git, name) if request.on_branch else None
    pointer, weights = request.stored or manager.store_weights(name, checkpoint)
    registration = Registration(name, checkpoint, pointer, weights, given, branch)

    def tag() -> tuple[str, bool]:
        if DvcCache(manager.root).files(pointer) is None:
            manager.store_weights(name, checkpoint)  # a version that shared them was deleted meanwhile
        history = manager.history(name)
        chosen = number or _bumped(history, request.bump, measured)
        return chosen, chosen not in history.known and registration.tag(git, history, chosen)

    number, made = in_turn(git, tag)
    if not made:
        return _same_or_conflict(manager, request, number, checkpoint)
    _keep_to_limit(manager, name, number)
    return manager.get_version(name, number)


def _refuse_nested(manager: ModelVersionManager, name: str) -> None:
    """Refuse a name whose folder would lie in another model's, or around it: DVC tracks no output within another."""
    for other in manager.list_models():
        if other.startswith(f"{name}/") or name.startswith(f"{other}/"):
            raise VersionConflictError(
                f"{name} can't be a model beside {other}: of the folders models/{name} and models/{other} one would hold "
                "the other",
                "choose a name that is not the beginning of the other, such as one in a folder of its own",
            )


def _made_before(
    manager: ModelVersionManager, history: History, request: Request, checkpoint: Checkpoint
) -> ModelVersion | None:
    """Return the greatest version where a bump would only repeat it, as after a command that was interrupted late."""
    latest = greatest(history.live)
    record = history.live[latest].record if latest else None
    if record is None or record.model_digest != checkpoint.model_digest:
        return None
    if request.metadata is not None and dict(request.metadata) != dict(record.metadata):
        return None
    there = manager.sound(history, str(latest))
    _log.warning("%s has these weights and this metadata already: no new version", there.reference)
    return there


def number_of(version: str | None, bump: str | None) -> str | None:
    """Return the number asked for, or None for a bump.

    Raises
    ------
    InvalidVersionError
        When it is no SemVer.
    ConfigError
        When both or neither are given, or the bump is none.

    """
    if (version is None) == (bump is None):
        raise ConfigError("give a version or a bump, one of the two", f"a bump is one of {', '.join(BUMPS)}")
    if bump is not None and bump not in BUMPS:
        raise ConfigError(f"bump {bump!r} is none", f"use one of {', '.join(BUMPS)}")
    return None if version is None else Version.parse(version).text


def _dependencies(manager: ModelVersionManager, request: Request) -> tuple[str, ...]:
    """Return what dependencies mean now. All exist already, and a number is never used again: only itself is a cycle."""
    references, reference = request.dependencies, f"{request.name}@v{request.number}"
    if isinstance(references, str):
        raise ConfigError("dependencies is one text, not a list of references", f"write [{references!r}]")
    for text in references:
        if str(Reference.parse(text)) == reference:
            raise VersionConflictError(f"{reference} can't depend on itself", "leave that dependency out")
    return tuple(dict.fromkeys(manager.resolve(text).reference for text in references))


def _declared_tolerance(history: History, request: Request) -> float | None:
    """Return the drift that a PATCH of this model may have, if anybody ever said."""
    if request.tolerance is not None:
        if not 0 <= request.tolerance < math.inf:
            raise ConfigError(
                f"tolerance is {request.tolerance}", "use a relative difference of 0 or more, such as 0.01"
            )
        return request.tolerance
    current = history.known[history.current].record if history.current else None
    told = current.compatibility if current else {}
    return float(told["tolerance"]) if told.get("declared") else None


def _measure(
    manager: ModelVersionManager, history: History, before: str, checkpoint: Checkpoint, tolerance: float | None
) -> Compatibility:
    from proteus_pipeline.registry.compatibility import DEFAULT_TOLERANCE, measure

    old = manager.sound(history, before).checkpoint
    return measure(old, checkpoint, tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance)


def _same_or_conflict(
    manager: ModelVersionManager, request: Request, number: str, checkpoint: Checkpoint
) -> ModelVersion:
    git, history = manager.ensure_home(), manager.history(request.name)
    if number not in history.known:
        _complete(git, request.name, number)
        history = manager.history(request.name)
    there = manager.version_of(history, number)
    digest = there.record.model_digest if there.record else there.checkpoint.model_digest
    known = dict(there.record.metadata) if there.record else {}
    conflict = None
    if number not in history.live:
        conflict = VersionConflictError(
            f"{there.reference} was deleted, and a version number is never used again",
            f"register the next version, or bring it back: proteus model restore {there.reference}",
        )
    elif digest != checkpoint.model_digest:
        conflict = VersionConflictError(
            f"{there.reference} exists with other weights: registered {digest}, given {checkpoint.model_digest}",
            "register these as a new version",
        )
    elif request.metadata is not None and dict(request.metadata) != known:
        conflict = VersionConflictError(
            f"{there.reference} exists with other metadata: registered {known}, given {dict(request.metadata)}",
            "leave the metadata out, or register a new version",
        )
    if conflict:
        manager.count(CONFLICTS)
        raise conflict
    if request.on_branch:
        follow(git, there.commit, request.name)
    return there


def _complete(git: Git, name: str, number: str) -> None:
    """Put a tag in its place that the ledger has and git has not: a process died between the two, or a hand took it."""
    tag = f"{name}@v{number}"
    entered = git.try_run("rev-parse", "--verify", "--quiet", LEDGER + tag)
    if entered is None:
        raise StorageError(f"git could not lock the tag {tag}", "run the command again")
    put_back(git, tag, entered)


def _keep_to_limit(manager: ModelVersionManager, name: str, number: str) -> None:
    if manager.max_versions is None or len(manager.history(name).live) <= manager.max_versions:
        return
    reason = f"more than {manager.max_versions} versions"
    try:
        deletions = retirement.retire(manager, name, manager.max_versions, reason=reason, new=number)
    except StorageError as error:
        # The version is registered: what is wrong with another one may not turn that into an error.
        _log.warning("%s has more than %d versions, and none could be deleted: %s", name, manager.max_versions, error)
        return
    for gone in deletions:
        how = "backed up" if manager.backup_enabled else "its weights stay in the DVC cache"
        _log.warning(
            "deleted %s, %s: %s has more than %d versions (max_versions); proteus model restore %s brings it back",
            gone.reference, how, name, manager.max_versions, gone.reference,
        )  # fmt: skip
    if len(manager.history(name).live) > manager.max_versions:
        _log.warning("%s has more than %d versions, and all others are needed", name, manager.max_versions)


def _bumped(history: History, bump: str | None, measured: Compatibility | None) -> str:
    """Return the number that a bump comes to, after the greatest that there ever was."""
    from proteus_pipeline.registry.compatibility import next_version

    level = measured.level if bump == "auto" and measured else "patch" if bump == "auto" else str(bump)
    return next_version(level, history.known)


def _allow(history: History, request: Request, before: str, measured: Compatibility) -> None:
    """Refuse a number, or a bump, that is less than the measured drift asks for."""
    from proteus_pipeline.registry.compatibility import allows, next_version

    if request.bump == "auto":
        return
    new = request.number or next_version(str(request.bump), history.known)
    if not allows(before, new, measured.level):
        raise CompatibilityError(
            f"{history.name} v{new} would follow v{before}, and asks for a {measured.level.upper()} step: "
            f"{'; '.join(measured.reasons)}",
            f"register it with --bump {measured.level}, or declare another --tolerance",
        )
