"""What a cluster's worker does with a shard. Everything here runs there; what it is given, and returns, is small.

A worker that dies has its shards run again, also those that were finished: so a task asks first whether its entries are
published. The model is loaded once in a worker, and kept.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.computing import Embedded, spans_of, tokens_of
from proteus_pipeline.embeddings.job import Job
from proteus_pipeline.embeddings.leases import seems_free
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.shared import LOCAL_BYTES
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.models.device import attested, device_class, resolve_device
from proteus_pipeline.models.encoder import ENGINE_REVISION
from proteus_pipeline.stores.counts import collecting
from proteus_pipeline.stores.redis import RedisClient
from proteus_pipeline.stores.redis_url import given_url

if TYPE_CHECKING:
    from proteus_pipeline.metrics.lines import Series
    from proteus_pipeline.models.encoder import Encoder
    from proteus_pipeline.serving.model_cache import ModelCacheManager

# A file that was made on another node shows when a network file system asks its server again: within so many seconds.
_VISIBLE_S = 60.0
_LOADING = threading.Lock()


@dataclass(frozen=True)
class Weights:
    """Which model a worker computes with, and how.

    Attributes
    ----------
    home
        The registry's folder, which every node sees by this name.
    reference, trunk
        The exact version, and what its trunk's digest must be.
    device, max_memory_gb
        ``runtime.device``, as each worker means it; what loaded models may take there.
    threads
        To compute with; None for as many as Dask was told that the worker has.
    token_budget
        Tokens in one pass.

    """

    home: str
    reference: str
    trunk: str
    device: str
    max_memory_gb: float | None
    threads: int | None
    token_budget: int


@dataclass(frozen=True)
class Places:
    """Where a run's embeddings lie, by names that every node knows them by.

    Attributes
    ----------
    cache
        The cache's folder.
    shared
        The cache beneath it, a folder or ``s3://BUCKET/PREFIX``; a worker reaches a bucket by its own node's credentials.
    local_bytes, write_back
        As for `proteus_pipeline.embeddings.cache.EmbeddingCache`.
    redis
        ``cache.redis``, which holds no password; None for what ``PROTEUS_REDIS_URL`` says on the worker.

    """

    cache: str
    shared: str | None = None
    local_bytes: int = LOCAL_BYTES
    write_back: bool = False
    redis: str | None = None


@dataclass(frozen=True)
class Task:
    """What the shards of a run have in common.

    Attributes
    ----------
    weights, recipe
        What to compute.
    places
        Where the embeddings lie.
    lease
        The name of the run's lease in it: a worker that does not see that file has another folder there.
    only_class
        The one device class whose entries the run accepts; empty for any.

    """

    weights: Weights
    recipe: Recipe
    places: Places
    lease: str
    only_class: str


class Counts(NamedTuple):
    """What became of a shard.

    Attributes
    ----------
    computed, found
        Sequences; the latter were there already.
    tokens
        Computed.
    worker
        Which process of which host.
    offered
        Vectors that Redis took.
    metrics
        What the worker counted, for the run to keep.

    """

    computed: int
    found: int
    tokens: int
    worker: str
    offered: int
    metrics: Mapping[Series, float]


def compute_shard(task: Task, sequences: dict[str, str]) -> Counts:
    """Have the cache hold the embeddings of a shard's sequences, by key.

    Raises
    ------
    ConfigError
        When this worker computes other bits than the run asked for: another revision, another device class.
    StorageError
        When it does not see the cache, or the weights.
    IntegrityError
        When its weights are others.

    """
    device = _checked(task)
    cache = _cache(task.places, device, same_class=bool(task.only_class))
    with collecting() as metrics, cache.hold() as lease:
        found = {entry.key for entry, _ in cache.find(sequences)}
        missing = {key: s for key, s in sequences.items() if key not in found}
        tokens, theirs, offered = 0, 0, 0
        if missing:
            weights, recipe = task.weights, task.recipe
            hot = cache.hot.run(weights.trunk, recipe) if cache.hot else None
            if hot:
                hot.begin()
            encoder = _encoder(weights, recipe, device)
            budget = weights.token_budget
            job = Job(weights.trunk, recipe, cache, encoder, attested(device), budget, lease, None, hot)
            done: dict[str, Embedded] = {}
            theirs = len(job.run(missing, done))
            tokens = sum(tokens_of(spans_of(s, recipe)) for s in missing.values())
            offered = hot.counts["put"] if hot else 0
    return Counts(len(missing) - theirs, len(found) + theirs, tokens, _here(), offered, metrics)


@lru_cache(maxsize=2)
def _cache(places: Places, device: str, *, same_class: bool) -> EmbeddingCache:
    """Return the cache, one for all shards of a run: a bucket or a Redis that does not answer is then waited for once."""
    url = given_url(places.redis)
    return EmbeddingCache(
        places.cache,
        accept="same_class" if same_class else "any",
        device_class=lambda: device_class(device),
        shared=places.shared,
        redis=RedisClient(url) if url else None,
        local_bytes=places.local_bytes,
        write_back=places.write_back,
    )


def _here() -> str:
    return f"{socket.gethostname()} (process {os.getpid()})"


def _checked(task: Task) -> str:
    """Return the device to compute on, once it is clear that this worker computes what was asked for."""
    host = socket.gethostname()
    if task.recipe.engine != ENGINE_REVISION:
        raise ConfigError(
            f"the worker on {host} computes by engine revision {ENGINE_REVISION}, and the run asks for {task.recipe.engine}",
            "install the same proteus_pipeline there",
        )
    lease = Path(task.places.cache, task.lease)
    _wait_for(
        lease,
        f"the worker on {host} does not see this run's cache, {task.places.cache}",
        "set cache.path to a folder that all nodes share, by the same name",
    )
    if seems_free(lease):
        raise StorageError(
            f"locks in {task.places.cache} do not reach from the run's node to {host}: each would take the other's runs for dead",
            "mount it with flock (Lustre, not localflock) or without local_lock (NFS)",
        )
    _wait_for(
        Path(task.weights.home),
        f"the worker on {host} does not see {task.weights.home}",
        "keep the project in a folder that all nodes share, by the same name",
    )
    device = resolve_device(task.weights.device)
    if task.only_class and device_class(device) != task.only_class:
        raise ConfigError(
            f"cache.accept=same_class: the worker on {host} is {device_class(device)}, this machine {task.only_class}",
            "use cache.accept=any, or start the run on a machine like the workers",
        )
    return device


def _wait_for(path: Path, what: str, remedy: str) -> None:
    ends = time.monotonic() + _VISIBLE_S
    while not path.exists():
        if time.monotonic() > ends:
            raise StorageError(what, remedy)
        time.sleep(0.5)


def _encoder(weights: Weights, recipe: Recipe, device: str) -> Encoder:
    """Return the encoder over a version's weights: loaded at the first shard that needs it, and kept by this process."""
    import torch

    threads = weights.threads or _threads_of_worker()
    if threads:
        torch.set_num_threads(threads)
    with _LOADING:
        models = _models(
            weights.home, weights.max_memory_gb, weights.token_budget, recipe.precision, recipe.numerics, device
        )
    model = models.get_or_load(weights.reference)
    if model.checkpoint.trunk_digest != weights.trunk:
        raise IntegrityError(
            f"{weights.reference} has trunk {model.checkpoint.trunk_digest} on {socket.gethostname()}, "
            f"and the run asks for {weights.trunk}",
            "run: proteus model verify",
        )
    return model.encoder()


@lru_cache(maxsize=1)  # a scheduler's workers see many runs, and have the memory of one cache
def _models(
    home: str, max_memory_gb: float | None, token_budget: int, precision: str, numerics: str, device: str
) -> ModelCacheManager:
    """Return the models of this worker, of whichever versions."""
    from proteus_pipeline.registry.versions import ModelVersionManager
    from proteus_pipeline.serving.model_cache import ModelCacheManager

    return ModelCacheManager(
        max_memory_gb,
        version_manager=ModelVersionManager(home),
        precision=precision,
        numerics=numerics,
        device=device,
        tokens_per_batch=token_budget,
    )


def _threads_of_worker() -> int:
    from distributed import get_worker

    try:
        return int(get_worker().state.nthreads)
    except ValueError:  # no worker: called as a function
        return 0
