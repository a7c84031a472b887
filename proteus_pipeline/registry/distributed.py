"""The registry of a group: weights on S3, versions and events through a git remote, hints from Redis.

Everything is as in `ModelVersionManager`, whose methods run here on a clone of what the group has: they look at the remote
once before they begin, and what they publish is published there first.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from proteus_pipeline.errors import ConfigError, StorageError
from proteus_pipeline.identity.names import Version, check_name
from proteus_pipeline.registry.bucket import find_bucket
from proteus_pipeline.registry.events import Event
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.hints import TRUSTED_S, Hints
from proteus_pipeline.registry.home import open_home
from proteus_pipeline.registry.places import registry_home
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.refs import exclusive, repeated
from proteus_pipeline.registry.shared import REMOTE_VARIABLE, SharedGit, group_remote, share_tags
from proteus_pipeline.registry.supply import send
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.versions import MAX_VERSIONS, ModelVersionManager
from proteus_pipeline.stores.redis_url import VARIABLE, given_url

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint

P = ParamSpec("P")
R = TypeVar("R")
_log = logging.getLogger(__name__)


def _reads(
    method: Callable[Concatenate[ModelVersionManager, P], R],
) -> Callable[Concatenate[ModelVersionManager, P], R]:
    """Return a method that looks at the git remote once, however often it reads."""

    @functools.wraps(method)
    def read(self: ModelVersionManager, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with _group(self).one_look():
            return method(self, *args, **kwargs)

    return read


def _writes(
    method: Callable[Concatenate[ModelVersionManager, P], R],
) -> Callable[Concatenate[ModelVersionManager, P], R]:
    """Return a method that begins with what the group has, or ends there, and begins again where others publish first."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def write(self: ModelVersionManager, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given, group = signature.bind(self, *args, **kwargs).arguments, _group(self)

        def change() -> R:
            with group.one_look(strict=True):
                if given.get("model_name") and given.get("version"):
                    group.share(given["model_name"], given["version"])
                made = method(self, *args, **kwargs)
                if isinstance(made, ModelVersion):
                    group.share(made.name, made.version)
                return made

        return repeated(change)

    return write


def _group(manager: ModelVersionManager) -> DistributedVersionManager:
    assert isinstance(manager, DistributedVersionManager)  # noqa: S101 - the decorators are this class's alone
    return manager


class DistributedVersionManager(ModelVersionManager):
    """The versions of a group, in a clone of what all of it share: the same behaviour as `ModelVersionManager`.

    A version that one registers is everybody's at once. Its weights go to S3 first; then its tag goes to the git remote, which
    decides between two of one name: the other one is refused with a `VersionConflictError`, and leaves nothing behind.

    Parameters
    ----------
    storage_backend
        ``"s3"``.
    cache_backend
        ``"redis"`` for hints, which spare looks at the git remote; None goes without, as does a Redis that is not there.
    storage_path
        The clone: by default the project's that this process runs in, else ``PROTEUS_HOME``, else ``~/.proteus/versions``,
        which is created where it is not there.
    s3_url
        ``s3://BUCKET/PREFIX``; by default ``PROTEUS_S3_URL``, else the clone's default DVC remote. Endpoint, region and keys
        come from the environment or ~/.aws, as AWS's own tools find them.
    redis_url
        ``redis://`` or ``rediss://``; by default ``PROTEUS_REDIS_URL``.
    git_remote
        A remote of the clone, or an address; by default ``PROTEUS_GIT_REMOTE``, else ``origin``, else the only one.
    backup_enabled, max_versions, metadata_schema
        As `ModelVersionManager` has them.

    Raises
    ------
    ConfigError
        For another backend, or what is no address.
    StorageError
        When no bucket or no git remote is named, or the clone can't be used. From a method that changes something, also when
        S3 or the git remote can't be reached; one that reads then goes by what is here, with one warning.

    """

    def __init__(
        self,
        storage_backend: str = "s3",
        cache_backend: str | None = "redis",
        *,
        storage_path: str | Path | None = None,
        s3_url: str | None = None,
        redis_url: str | None = None,
        git_remote: str | None = None,
        backup_enabled: bool = True,
        max_versions: int | None = MAX_VERSIONS,
        metadata_schema: str | Path | Mapping[str, Any] | None = None,
    ) -> None:
        if storage_backend != "s3":
            raise ConfigError(
                f"storage_backend {storage_backend!r} is none", "use 's3'; ModelVersionManager goes without one"
            )
        if cache_backend not in {"redis", None}:
            raise ConfigError(f"cache_backend {cache_backend!r} is none", "use 'redis', or None to go without")
        self._operation = threading.local()
        path = registry_home() if storage_path is None else storage_path
        super().__init__(path, backup_enabled, max_versions, metadata_schema)
        # What is missing is said before a home is made.
        self.bucket = find_bucket(self.root, s3_url)
        remote = group_remote(Git(self.root), git_remote)
        if remote is None:
            raise StorageError(
                f"no git remote is named for the versions of {self.root}",
                f"git remote add origin URL there, or give git_remote or {REMOTE_VARIABLE}",
            )
        self._hints = _hints(redis_url, self.bucket.url) if cache_backend else None
        self.root = open_home(self.root).root
        self.bucket.enter(self.root)
        self._known = self._git = SharedGit(self.root, remote, self._hints)

    register_version = _writes(ModelVersionManager.register_version)
    rollback = _writes(ModelVersionManager.rollback)
    delete_version = _writes(ModelVersionManager.delete_version)
    restore_version = _writes(ModelVersionManager.restore_version)
    prune = _writes(ModelVersionManager.prune)
    adopt = _writes(ModelVersionManager.adopt)

    get_version = _reads(ModelVersionManager.get_version)
    list_versions = _reads(ModelVersionManager.list_versions)
    list_models = _reads(ModelVersionManager.list_models)
    resolve = _reads(ModelVersionManager.resolve)
    dependents = _reads(ModelVersionManager.dependents)
    plan_deletion = _reads(ModelVersionManager.plan_deletion)
    diff = _reads(ModelVersionManager.diff)
    check = _reads(ModelVersionManager.check)
    verify = _reads(ModelVersionManager.verify)

    def store_weights(self, name: str, checkpoint: Checkpoint) -> tuple[Pointer, dict[str, Any]]:
        """Put the canonical folder into the DVC cache, and on S3; return its pointer, and what a record says of it."""
        stored = super().store_weights(name, checkpoint)
        send(self.root, stored[0], name, self.bucket.name)
        return stored

    def share(self, model_name: str, version: str) -> None:
        """Give the group a version that was registered here without it; nothing where there is none, or the group has it.

        Raises
        ------
        VersionConflictError
            When the group has another version of that number.
        StorageError
            When S3 or the git remote can't be written.

        """
        name, number = check_name(model_name), Version.parse(version).text
        history = self.history(name)
        event = history.known.get(number)
        if event is None or self._git.has(event.tag, event.oid):
            return
        there = self.version_of(history, number)
        send(self.root, there.pointer, there.reference, self.bucket.name)
        with exclusive(self._git):
            share_tags(self._git, self.history(name), number)

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Count what leaves no tag: here, and for the group where there is a Redis."""
        super().count(name, value, **labels)
        if self._hints:
            self._hints.count(name, int(value))

    def counted(self, metric: str) -> int | None:
        """Return how often the group's members have counted a metric; None without a Redis that answers."""
        return self._hints.counted(metric) if self._hints else None

    def stamp(self, name: str) -> tuple[int, ...] | None:
        """Return what changes when a tag of a model comes or goes, in this clone or by the group's telling.

        None where nobody tells: then each look-up is a look at the git remote.
        """
        generation = self._hints.generation() if self._hints else None
        own = super().stamp(name)
        if generation is None or own is None:
            return None
        # What came past Redis is found after a while, too.
        return (*own, int(generation, 16), int(time.monotonic() / TRUSTED_S))

    @contextmanager
    def one_look(self, *, strict: bool = False) -> Iterator[None]:
        """Look at the git remote, and only once however much the ``with`` block reads.

        Raises
        ------
        StorageError
            When it can't be reached, and the look is `strict`.

        """
        outermost = not getattr(self._operation, "looked", False)
        if outermost:
            self._git.look(strict=strict)
            self._operation.looked = True
        try:
            yield
        finally:
            if outermost:
                self._operation.looked = False

    def _events(self, name: str | None = None) -> list[Event]:
        if self._git.held:
            return super()._events(name)  # what is changed here was looked at when the lock was taken
        with self.one_look():
            return super()._events(name)


def _hints(url: str | None, group: str) -> Hints | None:
    """Return a Redis's hints; without one, versions are the same, and each look-up is a look at the git remote."""
    if not (url := given_url(url)):
        _log.warning(
            "no Redis is named (redis_url, %s): each look-up asks the git remote; cache_backend=None says so too",
            VARIABLE,
        )
        return None
    from proteus_pipeline.stores.redis import RedisClient

    return Hints(RedisClient(url), group)
