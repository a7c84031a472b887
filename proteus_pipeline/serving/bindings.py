"""What a name means now: which version, and so which weights."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import (
    CacheInvalidationError,
    ConfigError,
    IntegrityError,
    StorageError,
    VersionNotFoundError,
)
from proteus_pipeline.identity.names import Reference
from proteus_pipeline.registry.fetching import fetch_events
from proteus_pipeline.registry.places import registry_home
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.versions import ModelVersionManager
from proteus_pipeline.serving.interface import ModelInterface

if TYPE_CHECKING:
    from proteus_pipeline.models.architecture import Architecture
    from proteus_pipeline.models.checkpoint import Checkpoint

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Binding:
    """Weights, and the name that means them.

    Attributes
    ----------
    reference
        ``NAME@vX.Y.Z``, or the name alone of weights that are not registered.
    digest
        The model digest: two names of the same weights share what is loaded.
    open
        Opens the weights anew.
    architecture
        Theirs; asked for once they are wanted.
    version
        The registered version, or None.
    source
        Where weights that are not registered came from, as `ModelInterface.source` has it.

    """

    reference: str
    digest: str
    open: Callable[[], Checkpoint]
    architecture: Callable[[], Architecture]
    version: ModelVersion | None = None
    source: Mapping[str, Any] = field(default_factory=dict)


class Bindings:
    """Names of one registry; where it has not changed, a look at three files' times tells so.

    Weights that are not registered are known by the name they were given under, and those of a catalogue by ``NAME@vX.Y.Z``.
    """

    def __init__(self, manager: ModelVersionManager | None) -> None:
        self._given = manager
        self._known: dict[str, tuple[tuple[int, ...], ModelVersion]] = {}
        self._loose: dict[str, Binding] = {}
        self._entering: dict[str, threading.Lock] = {}
        self._digests: dict[str, str] = {}  # by reference, of all that was ever bound

    @property
    def manager(self) -> ModelVersionManager:
        """The registry: the one that was given, or the project's, or ``~/.proteus/versions``."""
        if self._given is None:
            self._given = ModelVersionManager(registry_home())
        return self._given

    def of(self, model: str | ModelInterface | ModelVersion) -> Binding:
        """Return what a reference, a model or a version means now.

        Raises
        ------
        ConfigError
            For anything else.
        VersionNotFoundError
            When a reference means nothing that is registered, cached or in a catalogue.
        CacheInvalidationError
            When the registry can't be read, and so nobody can tell what a name means.

        """
        if isinstance(model, ModelVersion):
            return self._noted(_registered(model))
        if isinstance(model, ModelInterface):
            return self._of_interface(model)
        if not isinstance(model, str):
            raise ConfigError(f"{model!r} is no model", "give a reference, a ModelInterface or a version")
        try:
            return self._noted(_registered(self.resolve(model)))
        except VersionNotFoundError:
            return self._loose.get(model) or self._of_interface(ModelInterface(model, self.manager))

    def _of_interface(self, model: ModelInterface) -> Binding:
        with _telling(f"which version {model.name} means"):
            version = model.version
        return self._noted(_registered(version) if version else self._enter(model))

    def _noted(self, binding: Binding) -> Binding:
        self._digests[binding.reference] = binding.digest
        return binding

    def known(self, reference: str) -> Binding | None:
        """Return what a reference means among what is registered and what was given; nothing is fetched or opened.

        Raises
        ------
        InvalidVersionError
            When it breaks the grammar.
        CacheInvalidationError
            As `of`.

        """
        try:
            version = self.resolve(reference)
        except VersionNotFoundError:
            name = Reference.parse(reference).name
            if reference in self._loose or not any(key.startswith(f"{name}@") for key in self._loose):
                return self._loose.get(reference)
            return self._loose.get(ModelInterface(reference, self.manager).listed or "")
        return self._noted(_registered(version))

    def digests(self, name: str) -> set[str]:
        """Return the digests of all live versions of a name, and of all else that was bound to it: deleted ones, given weights.

        Raises
        ------
        CacheInvalidationError
            As `of`.

        """
        with _telling(f"which versions {name} has"):
            versions = self.manager.list_versions(name)
        bound = {digest for known, digest in self._digests.items() if known.partition("@")[0] == name}
        return {v.record.model_digest for v in versions if v.record} | bound

    def bound(self, reference: str) -> str | None:
        """Return the digest that an exact reference meant when it was last bound, deleted since or not."""
        exact = Reference.parse(reference)
        return self._digests.get(f"{exact.name}@v{exact.selector}")

    def resolve(self, reference: str) -> ModelVersion:
        """Return the version that a reference means at this moment, whichever process last changed that.

        Raises
        ------
        VersionNotFoundError
            When nothing registered fits.
        CacheInvalidationError
            As `of`.

        """
        name = Reference.parse(reference).name
        with _telling(f"which version {reference} means now"):
            stamp = self.manager.stamp(name)
            known = self._known.get(reference)
            if known and stamp is not None and known[0] == stamp:
                return known[1]
            self._known.pop(reference, None)
            version = self.manager.resolve(reference)
        # The stamp was taken first: what changed meanwhile shows at the next look.
        if stamp is not None:
            self._known[reference] = (stamp, version)
        return version

    def look_again(self, name: str) -> None:
        """Forget what a name means here, having fetched what git remotes have of it; where they can't be reached, say so."""
        with _telling(f"what {name} means now"):
            git = self.manager.found()
        for failure in fetch_events(git, name) if git else ():
            _log.warning("%s is looked at anew, and its tags could not be fetched from %s", name, failure)
        for reference in [r for r in list(self._known) if r.partition("@")[0] == name]:
            self._known.pop(reference, None)

    def _enter(self, model: ModelInterface) -> Binding:
        """Bind weights that are not registered: one reader at a time, since it takes their digest over the whole file."""
        reference = model.listed or model.name
        with self._entering.setdefault(reference, threading.Lock()):
            if model.listed and reference in self._loose:
                return self._loose[reference]
            path, architecture, digest = model.path, model.architecture, model.checkpoint.model_digest
            binding = Binding(
                reference, digest, partial(_read, path, reference, digest), lambda: architecture, source=model.source
            )
            self._loose[reference] = binding
            return binding


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Ask the registry in a ``with`` block: where it can't be read, nobody can tell."""
    try:
        yield
    except StorageError as error:
        raise CacheInvalidationError(f"nobody can tell {what} ({error.what})", error.remedy) from error


def _read(path: Path, reference: str, digest: str) -> Checkpoint:
    """Read weights that are not registered, which nobody else keeps from being changed."""
    from proteus_pipeline.models.reading import read_checkpoint

    checkpoint = read_checkpoint(path)
    if checkpoint.model_digest != digest:
        raise IntegrityError(
            f"{path} is no longer what was cached as {reference}", "cache the model again by cache_model"
        )
    return checkpoint


def _registered(version: ModelVersion) -> Binding:
    digest = version.record.model_digest if version.record else version.checkpoint.model_digest
    return Binding(version.reference, digest, version.fresh, lambda: version.checkpoint.architecture, version)
