"""What a name means now: which version, and so which weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_pipeline.errors import CacheInvalidationError, ConfigError, StorageError, VersionNotFoundError
from proteus_pipeline.identity.names import Reference
from proteus_pipeline.registry.places import registry_home
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.versions import ModelVersionManager
from proteus_pipeline.serving.interface import ModelInterface

if TYPE_CHECKING:
    from proteus_pipeline.models.architecture import Architecture
    from proteus_pipeline.models.checkpoint import Checkpoint


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

    """

    reference: str
    digest: str
    open: Callable[[], Checkpoint]
    architecture: Callable[[], Architecture]
    version: ModelVersion | None = None


class Bindings:
    """Names of one registry; where it has not changed, a look at three files' times tells so."""

    def __init__(self, manager: ModelVersionManager | None) -> None:
        self._given = manager
        self._known: dict[str, tuple[tuple[int, ...], ModelVersion]] = {}
        self._loose: dict[str, Binding] = {}

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
            return _registered(model)
        if isinstance(model, ModelInterface):
            version = model.version
            return _registered(version) if version else self._enter(model)
        if not isinstance(model, str):
            raise ConfigError(f"{model!r} is no model", "give a reference, a ModelInterface or a version")
        try:
            return _registered(self.resolve(model))
        except VersionNotFoundError:
            if loose := self._loose.get(model):
                return loose
            interface = ModelInterface(model, self.manager)
            if interface.version is not None:  # registered a moment ago
                return _registered(interface.version)
            return self._enter(interface)

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
            return self._loose.get(reference)
        return _registered(version)

    def digests(self, name: str) -> set[str]:
        """Return the digests of all live versions of a name, and of weights that were given under it.

        Raises
        ------
        CacheInvalidationError
            As `of`.

        """
        try:
            versions = self.manager.list_versions(name)
        except StorageError as error:
            raise CacheInvalidationError(
                f"nobody can tell which versions {name} has ({error.what})", error.remedy
            ) from error
        loose = [self._loose[name].digest] if name in self._loose else []
        return {v.record.model_digest for v in versions if v.record} | set(loose)

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
        try:
            stamp = self.manager.stamp(name)
            known = self._known.get(reference)
            if known and stamp is not None and known[0] == stamp:
                return known[1]
            version = self.manager.resolve(reference)
        except VersionNotFoundError:
            self._known.pop(reference, None)
            raise
        except StorageError as error:
            self._known.pop(reference, None)
            raise CacheInvalidationError(
                f"nobody can tell which version {reference} means now ({error.what})", error.remedy
            ) from error
        # The stamp was taken first: what changed meanwhile shows at the next look.
        if stamp is not None:
            self._known[reference] = (stamp, version)
        return version

    def _enter(self, model: ModelInterface) -> Binding:
        architecture = model.architecture
        binding = Binding(model.name, model.checkpoint.model_digest, model.fresh, lambda: architecture)
        self._loose[model.name] = binding
        return binding


def _registered(version: ModelVersion) -> Binding:
    digest = version.record.model_digest if version.record else version.checkpoint.model_digest
    return Binding(version.reference, digest, version.fresh, lambda: version.checkpoint.architecture, version)
