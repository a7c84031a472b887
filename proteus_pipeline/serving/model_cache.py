"""Loaded models in memory: the right version, within a true budget, loaded once however many ask."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ConfigError, VersionNotFoundError
from proteus_pipeline.eviction.policies import DEFAULT_POLICY
from proteus_pipeline.identity.names import Reference
from proteus_pipeline.models.device import resolve_device
from proteus_pipeline.models.encoder import TOKENS_PER_BATCH, Encoder, Outputs, check_options
from proteus_pipeline.serving.bindings import Binding, Bindings
from proteus_pipeline.serving.calls import Call
from proteus_pipeline.serving.fellows import COUNTED, Fellows
from proteus_pipeline.serving.interface import ModelInterface
from proteus_pipeline.serving.residence import Residence
from proteus_pipeline.serving.settings import CacheSettings
from proteus_pipeline.serving.statistics import readings

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from proteus_pipeline.models.architecture import Architecture
    from proteus_pipeline.models.checkpoint import Checkpoint
    from proteus_pipeline.registry.version import ModelVersion
    from proteus_pipeline.registry.versions import ModelVersionManager

# What a model computes while it is warmed: as long as most proteins.
_WARMING = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 9


class ModelCacheManager:
    """Keeps models loaded, so that a service or a notebook that uses several versions loads each once.

    A name means what the registry says at the moment it is asked for: after a rollback or a new version, by this process or
    another one on the same repository, no older model is returned. Names of the same weights share what is loaded. All
    methods may be called from many threads.

    Parameters
    ----------
    max_memory_gb
        What loaded models may take, in 10^9 bytes: their weights, and what calls under way compute with; None for all of this
        machine's memory. A control group's limit caps it. Weights that are used where they lie in a mapped file count as
        those that are copied; what is mapped only while it is copied does not. What a call returns is its caller's.
    eviction_policy
        Which model goes first where there is no room: ``lru``, ``lfu``, ``fifo``, ``ttl``, or ``cost``, the one whose bytes
        save the fewest seconds of loading.
    distributed
        Whether processes and clones that use one Redis tell each other of invalidations, count together, and on one machine
        do not all load a model at once. What another one told is honoured by a look-up `STALE_S` (a second) later at the
        latest, and the time it takes to ask Redis and to fetch tags; where Redis is gone, all is as without.
    compression
        Whether a model that has to go is kept compressed in memory, where that was measured to be faster than its source.
    version_manager
        The registry; by default the project's, or ``~/.proteus/versions`` outside a project.
    precision, numerics
        As in `proteus_pipeline.models.encoder.make_encoder`.
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``: one cache is for one device, and has that device's budget.
    redis_url
        Of the Redis, for `distributed`; ``PROTEUS_REDIS_URL``'s where None.
    max_gpu_memory_gb, ttl, patience, tokens_per_batch
        See `proteus_pipeline.serving.settings.CacheSettings`.

    Raises
    ------
    ConfigError
        For a value that is unknown or out of range; for `distributed` without the URL of a Redis.

    """

    def __init__(
        self,
        max_memory_gb: float | None = 4,
        eviction_policy: str = DEFAULT_POLICY,
        distributed: bool = False,
        compression: bool = True,
        *,
        version_manager: ModelVersionManager | None = None,
        precision: str = "fp32",
        numerics: str = "strict",
        device: str = "cpu",
        max_gpu_memory_gb: float | None = None,
        ttl: float | None = None,
        patience: float = 10.0,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        redis_url: str | None = None,
    ) -> None:
        if not isinstance(distributed, bool):
            raise ConfigError(f"distributed is {distributed!r}", "use True or False")
        self._fellows = Fellows.at(redis_url) if distributed else None
        check_options(precision, numerics)
        settings = CacheSettings(
            max_memory_gb, max_gpu_memory_gb, eviction_policy, ttl, compression, patience, tokens_per_batch
        )
        turn = self._fellows.turn if self._fellows else None
        device = resolve_device(device)
        self._residence = Residence(settings, device=device, precision=precision, numerics=numerics, turn=turn)
        self._bindings = Bindings(version_manager)
        if self._fellows:  # what was counted since it last told the others
            weakref.finalize(self, _count, self._fellows, self._residence, at_once=True)

    def cache_model(self, model: ModelInterface | ModelVersion) -> CachedModel:
        """Load a model and keep it: a registered one as its version, any other by its name.

        Raises
        ------
        CacheMemoryError
            When it is larger than the budget, or models in use leave no room for it; nothing is let go for it.
        CacheInvalidationError
            When the registry can't be read, and so nobody can tell what a name means.
        ConfigError
            For what is no model.
        ProteusError
            What reading its weights raises: `ModelInterface.checkpoint`.

        """
        if isinstance(model, str):
            raise ConfigError(f"{model!r} is a name, not a model", "use get_or_load for a name")
        return self._loaded(self._of(model))

    def get_cached_model(self, model_name: str) -> CachedModel | None:
        """Return what a name or reference means now, if it is loaded; None if not.

        Raises
        ------
        InvalidVersionError
            When it breaks the grammar.
        CacheInvalidationError
            When the registry can't be read.

        """
        self._hear(model_name)
        binding = self._bindings.known(model_name)
        if binding is None:
            self._forget(model_name)
        found = self._residence.peek(binding.digest if binding else "")
        return CachedModel(self, binding) if binding and found else None

    def get_or_load(self, model: str | ModelInterface | ModelVersion) -> CachedModel:
        """Return a model, loaded now if it is not yet: once, however many threads ask.

        Raises
        ------
        VersionNotFoundError
            When nothing has that name.
        CacheMemoryError, CacheInvalidationError, ProteusError
            As `cache_model`. A failed load fails all who waited for it; until a pause is over that doubles each time, from
            half a second to 30, who asks again gets the same error at once.

        """
        return self._loaded(self._of(model))

    @contextmanager
    def lease(self, model: str | ModelInterface | ModelVersion) -> Iterator[CachedModel]:
        """Keep a model loaded in a ``with`` block, whatever else is loaded meanwhile; what it yields computes as long.

        Raises
        ------
        ProteusError
            As `get_or_load`.

        """
        binding = self._of(model)
        with self._residence.leased(binding):
            yield CachedModel(self, binding)

    def preload(self, *models: str | ModelInterface | ModelVersion) -> list[CachedModel]:
        """Load models before they are asked for, one after the other.

        Raises
        ------
        CacheMemoryError
            When not all have room together: those before it stay loaded.
        ProteusError
            As `get_or_load`.

        """
        bindings = [self._of(model) for model in models]
        with ExitStack() as stack:
            for binding in bindings:
                stack.enter_context(self._residence.leased(binding))
            return [CachedModel(self, binding) for binding in bindings]

    def warm(self, *models: str | ModelInterface | ModelVersion) -> list[CachedModel]:
        """Load models, and compute one protein with each, so that tables, buffers and pages are there for the first request.

        Raises
        ------
        ProteusError
            As `preload`.

        """
        loaded = self.preload(*models)
        for model in loaded:
            model.embed([_WARMING])
        return loaded

    def invalidate(self, model: str) -> int:
        """Serve a version no more, or, by a name alone, all that was loaded under it; return how many were.

        With `distributed`, all others let go of what they loaded under the name, fetch its tags, and look at it anew: so
        call it after ``git push`` of a rollback. Who computes with one goes on, and its memory comes back when that is done.

        Raises
        ------
        InvalidVersionError
            When a reference breaks the grammar.
        CacheInvalidationError
            When the registry can't be read, so that nobody can tell which models are meant.

        """
        reference = Reference.parse(model)
        if "@" not in model:
            count = self._residence.drop(self._bindings.digests(reference.name), "invalidated")
        else:
            binding = self._bindings.known(model)
            digest = binding.digest if binding else self._bindings.bound(model)
            count = self._residence.drop({digest}, "invalidated") if digest else 0
        if self._fellows:
            self._fellows.tell(reference.name)
        return count

    def clear_cache(self) -> int:
        """Let go of all models and compressed copies; return how many models. As `invalidate`, for those in use."""
        return self._residence.drop(None, "cleared")

    def update_cache_config(self, config: Mapping[str, Any]) -> CacheSettings:
        """Change settings while models are served; what no longer fits is let go.

        Parameters
        ----------
        config
            Some of `CacheSettings`, by name.

        Returns
        -------
        CacheSettings
            All that are now in force.

        Raises
        ------
        ConfigError
            For an unknown name or a value out of range; the old settings stand.
        CacheMemoryError
            When models in use do not fit into a smaller limit; the old settings stand.

        """
        if isinstance(config, Mapping) and "distributed" in config:
            if config["distributed"] is not (self._fellows is not None):
                raise ConfigError(
                    f"distributed can't become {config['distributed']!r} now", "make another ModelCacheManager"
                )
            config = {name: value for name, value in config.items() if name != "distributed"}
        return self._residence.configure(config)

    def get_cache_stats(self) -> dict[str, Any]:
        """Return what the cache holds and has done.

        Returns
        -------
        dict
            ``hits``, ``misses``, ``hit_rate`` (None before the first request), ``loads``, ``restored`` (from a compressed
            copy), ``load_failures``, ``load_seconds`` and ``age_at_eviction_seconds`` (``p50``, ``p95``), ``evictions`` by
            cause, ``leases``, ``models`` and ``compressed`` (bytes by model digest), ``bytes`` of ``limit_bytes``,
            ``limited_by``, and ``devices``: of each the bytes of models, loads, calls, what is still being freed, and
            copies. ``shared``: what all caches on one Redis have counted together, about; None without `distributed`, or
            where Redis can't be asked.

        """
        stats = self._residence.stats()
        if self._fellows:
            _count(self._fellows, self._residence, at_once=True)
        return stats | {"shared": self._fellows.counted() if self._fellows else None}

    def collect(self) -> Iterator[Metric]:
        """Yield the same numbers as Prometheus's metrics: ``prometheus_client.REGISTRY.register(cache)`` has them scraped.

        A registry takes one cache: a second one's metrics would have the same names.
        """
        return readings(self.get_cache_stats(), self._residence.counts).families()

    def prometheus(self) -> str:
        """Return the same numbers as text that Prometheus reads."""
        return readings(self.get_cache_stats(), self._residence.counts).text()

    def _of(self, model: str | ModelInterface | ModelVersion) -> Binding:
        if not isinstance(model, str | ModelInterface):
            return self._bindings.of(model)
        name = model if isinstance(model, str) else model.name
        self._hear(name)
        try:
            return self._bindings.of(model)
        except VersionNotFoundError:
            self._forget(name)
            raise

    def _hear(self, model: str) -> None:
        """Honour what others have told since they were last listened to."""
        if self._fellows is None:
            return
        name = Reference.parse(model).name
        self._fellows.listen(name)
        self._fellows.honour(name, partial(self._look_again, name))
        _count(self._fellows, self._residence)

    def _forget(self, model: str) -> None:
        if self._fellows:
            self._fellows.forget(Reference.parse(model).name)

    def _look_again(self, name: str) -> None:
        self._bindings.look_again(name)
        self._residence.drop(self._bindings.digests(name), "invalidated")

    def _loaded(self, binding: Binding) -> CachedModel:
        with self._residence.leased(binding):
            return CachedModel(self, binding)


def _count(fellows: Fellows, residence: Residence, *, at_once: bool = False) -> None:
    """Tell the others what a cache has counted."""
    c = residence.counts
    counted = c.hits, c.misses, c.loads, c.restored, c.failures, c.evictions.total()
    fellows.count(dict(zip(COUNTED, counted, strict=True)), at_once=at_once)


class CachedModel(ModelInterface):
    """A model that a `ModelCacheManager` holds. Each call keeps it loaded while it computes, and loads it again if it went.

    Attributes
    ----------
    reference
        ``NAME@vX.Y.Z``, or the name alone where it is not registered.

    """

    def __init__(self, cache: ModelCacheManager, binding: Binding) -> None:
        super().__init__(binding.reference, cache._bindings.manager)  # noqa: SLF001 - one module, one thing
        self.reference = binding.reference
        self._residence, self._binding = cache._residence, binding  # noqa: SLF001
        self._precision = self._residence.precision
        self.__dict__["version"] = binding.version  # what was resolved, and not what the name may mean later

    @property
    def architecture(self) -> Architecture:
        """The weights' architecture, for which a file that can't be mapped is not read again."""
        return self._binding.architecture()

    def fresh(self) -> Checkpoint:
        """Open the weights anew."""
        return self._binding.open()

    @property
    def source(self) -> Mapping[str, Any]:
        """Where weights that are not registered came from, for a version's record."""
        return self._binding.source

    def encoder(self, **options: str) -> Encoder:
        """Return the encoder that the cache holds; until it is dropped, its bytes count, evicted or not."""
        asked = self._filled(options)
        if asked != self._filled({}):
            return super().encoder(**asked)
        with self._residence.leased(self._binding) as resident:
            resident.lent = True
            return resident.encoder

    @contextmanager
    def _using(
        self, options: Mapping[str, str], sequences: Sequence[str], outputs: Outputs
    ) -> Iterator[tuple[Encoder, int]]:
        call, asked = (
            Call(tuple(map(len, sequences)), attention=outputs.contacts or bool(outputs.received)),
            self._filled(options),
        )
        if asked != self._filled({}):
            with (
                self._residence.beside(self.reference, self.architecture, asked["precision"], call),
                super()._using(asked, sequences, outputs) as using,
            ):
                yield using
            return
        with self._residence.computing(self._binding, call) as encoder:
            yield encoder, self._residence.settings.tokens_per_batch

    def _filled(self, options: Mapping[str, str]) -> dict[str, str]:
        """Return options, the cache's where they say nothing."""
        held = self._residence
        asked = {"precision": held.precision, "numerics": held.numerics, "device": held.device, **options}
        return asked | {"device": resolve_device(asked["device"])}
