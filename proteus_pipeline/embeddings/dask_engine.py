"""``engine=dask``: misses as shards on a cluster's workers. They write to the cache; the run gives out work, and counts.

A worker has one shard at a time. Dask blames all that a dead worker had been given; so, of one that died, only the shard
that it was at has failed once more, and one that kills its workers takes no other with it.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_pipeline.embeddings.cluster import ClusterOptions, Running, running
from proteus_pipeline.embeddings.computing import Embedded
from proteus_pipeline.embeddings.engine import Done, Work
from proteus_pipeline.embeddings.shard_task import Counts, Places, Task, Weights, compute_shard
from proteus_pipeline.embeddings.shards import shards
from proteus_pipeline.errors import ClusterError, ProteusError, StorageError
from proteus_pipeline.sequences.fasta import shown
from proteus_pipeline.stores.counts import add

if TYPE_CHECKING:
    from distributed import Future

    from proteus_pipeline.embeddings.found import Entry

ATTEMPTS = 3
# How often to look whether there are workers, seconds, and to ask for those that were lost.
_LOOK_S, _MEND_S = 1.0, 30.0
# How long what another node published may take to show here: beyond this, it went to another folder.
_VISIBLE_S = 120.0
# How long a scheduler may be silent: Dask waits for ever for one that was stopped.
_SILENT_S = 60.0
_FEW = 5
_log = logging.getLogger(__name__)


@dataclass
class _Shard:
    number: int
    sequences: dict[str, str]
    attempts: int = 0
    why: str = ""


@dataclass(frozen=True)
class DaskEngine:
    """A cluster's workers.

    Attributes
    ----------
    options
        Which cluster.
    weights
        Makes sure that the weights are there, and says which; called only when something must be computed.
    places
        Where the embeddings lie.
    only_class
        Returns the device class of the entries that the run accepts; empty for any.
    folder
        For logs and certificates of jobs.
    names
        Ids of some sequences, to name them where one fails.

    """

    options: ClusterOptions
    weights: Callable[[], Weights]
    places: Places
    only_class: Callable[[], str]
    folder: Path
    names: Mapping[str, str] = field(default_factory=dict)

    def compute(self, work: Work) -> Done:
        """Compute and publish on workers.

        Raises
        ------
        ClusterError
            When there is no cluster, it goes away, or some shards could not be computed; the others then are.
        ProteusError
            When a worker says what is wrong: that fails everywhere alike, and is not tried again.

        """
        if work.lease.name is None:
            raise StorageError(
                f"{self.places.cache} can't be written to, so that workers could not know it by this run's lease",
                "use a cache.path that can be written to",
            )
        weights = self.weights()
        memory = self.options.memory_each(weights.max_memory_gb)
        weights = replace(weights, threads=self.options.threads_each, max_memory_gb=memory)
        task = Task(weights, work.recipe, self.places, work.lease.name, self.only_class())
        divided = shards(work.missing, work.recipe, self.options.shard_tokens)
        work.start()
        with running(self.options, self.folder) as cluster:
            run = _Run(
                cluster, task, self.options.wait_minutes * 60, work, [_Shard(n, s) for n, s in enumerate(divided, 1)]
            )
            run.all()
        self._report(run.failed, len(divided))
        return Done(_published(work), run.computed, workers=len(run.workers))

    def _report(self, failed: list[_Shard], of: int) -> None:
        """Say what could not be computed, by the ids of its sequences."""
        if not failed:
            return
        for shard in failed:
            _log.warning("shard %d %s; its sequences: %s", shard.number, shard.why, ", ".join(self._ids(shard)))
        why = "; ".join(f"shard {shard.number} {shard.why}" for shard in failed[:_FEW])
        raise ClusterError(
            f"{len(failed)} of {of} shards could not be computed: {why}: {_few(i for s in failed for i in self._ids(s))}",
            "all others are in the cache; look at the workers' memory and at these sequences, and run it again",
        )

    def _ids(self, shard: _Shard) -> list[str]:
        return [shown(self.names.get(sequence, sequence[:20])) for sequence in shard.sequences.values()]


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_FEW]) + (f", and {len(listed) - _FEW} more" if len(listed) > _FEW else "")


class _Run:
    """One run's shards on a cluster."""

    def __init__(self, cluster: Running, task: Task, patience: float, work: Work, shards: Iterable[_Shard]) -> None:
        self._cluster, self._task, self._work = cluster, task, work
        self._patience = patience
        self._todo = deque(shards)
        self._flying: dict[Future, tuple[_Shard, str]] = {}  # and the worker that it was given to
        self._name = secrets.token_hex(6)
        self._mended = self._had_workers = time.monotonic()
        self.failed: list[_Shard] = []
        self.computed = 0
        self.workers: set[str] = set()

    def all(self) -> None:
        """Have every shard computed, or given up."""
        while self._todo or self._flying:
            self._give_out(self._workers())
            self._wait()
            for future in [f for f in self._flying if f.status != "pending"]:
                self._take(future, self._flying.pop(future)[0])

    def _workers(self) -> list[str]:
        """Return the addresses of the workers that there are."""
        client = self._cluster.client
        try:
            workers = list(client.sync(client.scheduler.ncores, callback_timeout=_SILENT_S))
        except (OSError, TimeoutError, CancelledError, RuntimeError) as error:
            raise self._gone() from error
        now = time.monotonic()
        if workers:
            self._had_workers = now
        elif now - self._had_workers > self._patience:
            raise ClusterError(
                f"{self._cluster.name} had no worker for {self._patience / 60:g} minutes",
                "look at the queue and at the jobs' logs, or wait longer by cluster.wait_minutes",
            )
        if now - self._mended > _MEND_S:
            self._mended = now
            self._cluster.mend()
        return workers

    def _give_out(self, workers: list[str]) -> None:
        """Give a shard to each worker that has none, by name: left to choose, Dask at times gives one worker two."""
        busy = {worker for _, worker in self._flying.values()}
        for worker in workers:
            if self._todo and worker not in busy and len(self._flying) < len(workers):
                shard = self._todo.popleft()
                key = f"proteus-{self._name}-{shard.number}-{shard.attempts}"
                future = self._cluster.client.submit(
                    compute_shard, self._task, shard.sequences,
                    key=key, pure=False, workers=[worker], allow_other_workers=True,
                )  # fmt: skip
                self._flying[future] = shard, worker

    def _wait(self) -> None:
        from distributed import wait

        try:
            if self._flying:
                wait(list(self._flying), timeout=_LOOK_S, return_when="FIRST_COMPLETED")
            else:
                time.sleep(_LOOK_S)
        except TimeoutError:
            pass
        except CancelledError as error:
            raise self._gone() from error

    def _take(self, future: Future, shard: _Shard) -> None:
        """Count a shard that is done, or see what became of it."""
        counts, error = _result(future)
        if counts:
            self.computed += counts.computed
            self.workers.add(counts.worker)
            add(counts.metrics)
            if self._work.hot:
                self._work.hot.counts["put"] += counts.offered
            if self._work.progress:
                self._work.progress.advance(len(shard.sequences), counts.tokens, 0.0)
        elif error:
            self._failed(shard, error)
        else:
            raise self._gone()

    def _failed(self, shard: _Shard, error: BaseException) -> None:
        from distributed import KilledWorker

        if isinstance(error, ProteusError):
            raise error
        if isinstance(error, ImportError):
            raise ClusterError(
                f"a worker can't run this: {_line(error)}", "install the same proteus_pipeline there"
            ) from error
        if isinstance(error, KilledWorker):
            # A scheduler that somebody else started tries on its own first.
            shard.attempts += error.allowed_failures + 1
            shard.why = f"killed its worker {shard.attempts} times"
        else:
            shard.attempts += 1
            shard.why = f"failed {shard.attempts} times ({_line(error)})"
        if shard.attempts >= ATTEMPTS:
            self.failed.append(shard)
            return
        _log.warning("shard %d %s; it is tried again", shard.number, shard.why.replace(" 1 times", " once"))
        self._todo.append(shard)

    def _gone(self) -> ClusterError:
        return ClusterError(
            f"the scheduler of {self._cluster.name} is gone",
            "start it and its workers again, and run this again: what was finished is kept",
        )


def _result(future: Future) -> tuple[Counts | None, BaseException | None]:
    """Return what a task counted, or its error; neither where the scheduler went, be it between two questions."""
    from distributed import KilledWorker

    # Not where a worker died before it gave what it had: its shard was tried again by Dask, and may have failed.
    with suppress(CancelledError, OSError, KilledWorker):
        if future.status == "finished":
            return future.result(), None
    with suppress(CancelledError, OSError):
        if future.status == "error":
            return None, future.exception()
    return None, None


def _published(work: Work, patience: float = _VISIBLE_S) -> dict[str, Embedded]:
    """Return what workers published, as soon as all of it is seen here: a network file system shows it late.

    Raises
    ------
    StorageError
        When it is not seen in time.

    """
    ends = time.monotonic() + patience
    while True:
        found = work.cache.candidates(list(work.missing))
        absent = [key for key in work.missing if key not in found]
        if not absent:
            break
        if time.monotonic() > ends:
            raise StorageError(
                f"{len(absent)} embeddings that workers published are not seen in {work.cache.path}",
                "set cache.path to a folder that all nodes share, and run it again",
            )
        time.sleep(_LOOK_S)
    return {key: _described(_sound(work, entries)) for key, entries in found.items()}


def _sound(work: Work, entries: list[Entry]) -> Entry:
    """Return the entry that would be served: where there are several, one may be the damaged one that made it a miss."""
    if len(entries) == 1:
        return entries[0]
    return next((entry for entry, _ in work.cache.find([entries[0].key])), entries[0])


def _described(entry: Entry) -> Embedded:
    return Embedded(entry.key, entry.shape, entry.stored, entry.content)


def _line(error: BaseException) -> str:
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
