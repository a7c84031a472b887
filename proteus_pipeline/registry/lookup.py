"""Reading a registry: which versions there are, and what references mean."""

from __future__ import annotations

import time
from pathlib import Path

from proteus_pipeline.errors import VersionNotFoundError
from proteus_pipeline.identity.names import Reference, Version, check_name
from proteus_pipeline.registry.events import Event, History, fold, greatest
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.home import find_home, open_home, other_home
from proteus_pipeline.registry.tags import read_events
from proteus_pipeline.registry.version import ModelVersion

_CLOCK_STEP_NS = 100_000_000  # file systems' clocks go in steps of some milliseconds


class VersionLookup:
    """What is registered in the repository at `root`, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self._known: Git | None = None
        self._refs: Path | None = None
        self.found()

    def found(self) -> Git | None:
        """Return the repository, or None while nobody has created it."""
        if self._known is None and (found := find_home(self.root)):
            self._known, self.root = found, found.root
        return self._known

    def ensure_home(self) -> Git:
        """Return the repository, created when there is none; StorageError when it can't be."""
        self._known = self.found() or open_home(self.root)
        self.root = self._known.root
        return self._known

    def get_version(self, model_name: str, version: str) -> ModelVersion:
        """Return one live version; its weights are mapped, or fetched, when first asked for.

        Raises
        ------
        InvalidVersionError
            For a name or version that breaks the grammar.
        VersionNotFoundError
            When there is no such version, with those there are.
        IntegrityError
            When its record is damaged, or of a later schema.

        """
        history = self.history(check_name(model_name))
        number = Version.parse(version).text
        if number not in history.live:
            raise self.not_found(history, f"v{number}")
        return self.sound(history, number)

    def list_versions(self, model_name: str) -> list[ModelVersion]:
        """Return a model's live versions in SemVer order, also those with `damage`; none is an empty list."""
        history = self.history(check_name(model_name))
        return [self._version(history, number) for number in history.live]

    def list_models(self) -> dict[str, list[ModelVersion]]:
        """Return every model's live versions, by name."""
        return {h.name: [self._version(h, number) for number in h.live] for h in self.histories() if h.live}

    def resolve(self, reference: str) -> ModelVersion:
        """Return the version a reference means now.

        Raises
        ------
        InvalidVersionError
            When the reference breaks the grammar.
        VersionNotFoundError
            When nothing fits it.
        IntegrityError
            When the record of the version it means is damaged; no other version stands in for it.

        """
        wanted = Reference.parse(reference)
        history = self.history(wanted.name)
        fitting = [v for v in history.live if wanted.selects(Version(v))]
        number = history.current if wanted.selector == "current" else greatest(fitting)
        if number is None:
            raise self.not_found(history, f"v{wanted.selector}" if wanted.exact else wanted.selector)
        return self.sound(history, number)

    def stamp(self, name: str) -> tuple[int, ...] | None:
        """Return what changes when a tag of a model comes or goes, by whichever process: a few microseconds.

        None where that can't be told: there is no repository, or a tag came so recently that another might have come at
        the same reading of the file system's clock.
        """
        git = self.found()
        if git is None:
            return None
        if self._refs is None:
            self._refs = git.folder()
        tags = self._refs / "refs" / "tags"
        parents = (tags.joinpath(*name.split("/")[:depth]) for depth in range(name.count("/") + 1))
        times = []
        for place in (self._refs / "packed-refs", self._refs / "reftable" / "tables.list", *parents):
            try:
                found = place.stat()
            except OSError:
                times += [0, 0]
            else:
                times += [found.st_mtime_ns, found.st_ino]
        return None if time.time_ns() - max(times[::2]) < _CLOCK_STEP_NS else tuple(times)

    def history(self, name: str) -> History:
        """Return a model's events in order, and what they come to."""
        return fold(name, self._events(name))

    def histories(self, name: str | None = None) -> list[History]:
        """Return the history of one model, or of each, by name."""
        by_name: dict[str, list[Event]] = {}
        for event in self._events(name):
            by_name.setdefault(event.name, []).append(event)
        return [fold(name, events) for name, events in sorted(by_name.items())]

    def dependents(self, reference: str) -> list[ModelVersion]:
        """Return the live versions that depend on a version.

        Raises
        ------
        VersionNotFoundError
            When there is no such version.

        """
        wanted = self.resolve(reference).reference
        live = [v for versions in self.list_models().values() for v in versions]
        return [v for v in live if v.record and wanted in v.record.dependencies]

    def _events(self, name: str | None = None) -> list[Event]:
        git = self.found()
        return read_events(git, name) if git else []

    def _version(self, history: History, number: str) -> ModelVersion:
        e = history.known[number]
        current = number == history.current
        return ModelVersion(
            history.name, number, e.tag, e.commit, e.record, current, self.root, e.damage, e.oid, e.time
        )

    def version_of(self, history: History, number: str, *, damaged: bool = False) -> ModelVersion:
        """Return a version that was ever registered, deleted or not.

        Raises
        ------
        VersionNotFoundError
            When it was not.
        IntegrityError
            When its record is damaged, unless `damaged` ones are wanted too.

        """
        if number not in history.known:
            raise self.not_found(history, f"v{number}")
        return self._version(history, number) if damaged else self.sound(history, number)

    def sound(self, history: History, number: str) -> ModelVersion:
        """Return a version that was ever registered; its damage is raised."""
        version = self._version(history, number)
        if version.damage:
            raise version.damage
        return version

    def not_found(self, history: History, wanted: str) -> VersionNotFoundError:
        """Return the error that says what there is instead, here and in the other home."""
        elsewhere = self._elsewhere(history.name)
        number = wanted.removeprefix("v")
        if number in history.known:
            return VersionNotFoundError(
                f"{history.name} has no version {wanted} in {self.root}: it was deleted",
                f"it has {', '.join(f'v{v}' for v in history.live) or 'none'}; "
                f"proteus model restore {history.name}@{wanted} brings it back",
            )
        if not history.live:
            known = ", ".join(self.list_models()) or "none"
            return VersionNotFoundError(
                f"no model {history.name} is registered in {self.root}",
                f"registered there: {known}{elsewhere}; see proteus model list",
            )
        return VersionNotFoundError(
            f"{history.name} has no version {wanted} in {self.root}",
            f"it has {', '.join(f'v{v}' for v in history.live)}{elsewhere}",
        )

    def _elsewhere(self, name: str) -> str:
        """Return what the other registry, where a user may have meant it, has of a model."""
        other = other_home(self.root)
        if other is None:
            return ""
        found = fold(name, read_events(Git(other), name)).live
        return f"; {other} has {name} {', '.join(f'v{v}' for v in found)}: --home {other}" if found else ""
