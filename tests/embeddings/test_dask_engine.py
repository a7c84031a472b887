"""Clusters that are real: workers, a scheduler and their deaths."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import distributed  # before dask.config.set, which would otherwise forget its settings again
import psutil
import pytest
from bench import RECIPE, Bench, Told
from conftest import ROOT, make_checkpoint
from dask_cluster import DaskCluster, certificates, dask_cluster
from redis_server import redis_server
from s3 import SECRET_KEY, S3Server
from slurm import Slurm, missing, slurm

from proteus_pipeline import ModelCacheManager, ModelInterface, ModelVersionManager
from proteus_pipeline.embeddings import cluster as clusters
from proteus_pipeline.embeddings import dask_engine, shard_task
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.cluster import ClusterOptions, Running
from proteus_pipeline.embeddings.embedder import embed
from proteus_pipeline.embeddings.engine import Work
from proteus_pipeline.embeddings.shard_task import Places, Task, Weights, compute_shard
from proteus_pipeline.embeddings.shards import shards
from proteus_pipeline.embeddings.usage import uses
from proteus_pipeline.errors import ClusterError, ConfigError, IntegrityError, StorageError
from proteus_pipeline.metrics.lines import by_name
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.device import attested
from proteus_pipeline.models.encoder import make_encoder
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.sequences.fasta import read_fasta
from proteus_pipeline.stores.counts import CountsFile, counting
from proteus_pipeline.stores.redis import RedisClient

pytestmark = pytest.mark.xdist_group("dask")  # one cluster at a time: each has processes of its own

TORTURE = os.environ.get("PROTEUS_TORTURE") == "1"
LOCAL = ClusterOptions(shard_tokens=1000, threads=1)


@pytest.fixture(scope="module")
def proteins() -> dict[str, str]:
    """Some demonstration proteins by id; at full count, 2,000 distinct pieces of all."""
    records = {r.id: r.sequence for r in read_fasta(ROOT / "data" / "demo100.fasta")}
    if not TORTURE:
        return dict(sorted(records.items(), key=lambda item: len(item[1]))[:36])
    chance = random.Random(0)
    pieces: dict[str, str] = {}
    while len(set(pieces.values())) < 2000:
        whole = chance.choice(list(records.values()))
        start = chance.randrange(max(1, len(whole) - 60))
        pieces[f"piece{len(pieces)}"] = whole[start : start + chance.randint(40, 160)]
    return pieces


@pytest.fixture(scope="module")
def registry(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with the demonstration model, as nodes share it."""
    root = tmp_path_factory.mktemp("shared") / "registry"
    ModelVersionManager(root).register_version(ModelInterface("demo", weights=weights), "1.0.0")
    return root


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint, proteins: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Content hashes by key, as this process computes them alone."""
    outcome = embed(
        list(proteins.values()),
        trunk=checkpoint.trunk_digest,
        recipe=RECIPE,
        cache=EmbeddingCache(tmp_path_factory.mktemp("alone")),
        encoder=lambda: make_encoder(checkpoint),
        attest=lambda: attested("cpu"),
    )
    return {e.key: e.content for e in outcome.entries}


@pytest.fixture
def bench(tmp_path: Path, registry: Path, checkpoint: Checkpoint, proteins: dict[str, str]) -> Bench:
    return Bench(tmp_path / "cache", registry, checkpoint.trunk_digest, proteins)


def worker_processes() -> list[psutil.Process]:
    """The worker processes of a local cluster: children of the nannies, which are in this process."""
    return [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def check_all_there_none_twice(bench: Bench, alone: dict[str, str]) -> None:
    assert bench.stored() == dict.fromkeys(alone, 1)
    assert bench.contents() == alone


def test_workers_give_the_bits_that_this_process_gives(
    bench: Bench, alone: dict[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    # Dask would leave its own: what is started later would compute with one thread.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    before = os.environ.get("PYTHONHASHSEED")
    refused: list[str] = []

    def knock() -> None:
        address = distributed.default_client().scheduler.address
        with pytest.raises(OSError, match=r"Timed out|certificate|handshake"):
            distributed.Client(address, security=distributed.Security.temporary(), timeout=2)
        refused.append(address)

    told = Told(1, knock)
    outcome = bench.run(LOCAL, told)
    assert [address[:16] for address in refused] == ["tls://127.0.0.1:"]
    assert {e.key: e.content for e in outcome.entries} == alone
    check_all_there_none_twice(bench, alone)
    assert (outcome.hits, outcome.computed, outcome.workers) == (0, len(alone), 2)
    assert (told.total, told.hits, told.done, told.tokens) == (len(alone), 0, len(alone), outcome.tokens)
    again = bench.run(LOCAL)
    assert (again.hits, again.computed, again.workers) == (len(alone), 0, 0)
    assert again.entries == outcome.entries
    assert not worker_processes()
    assert capfd.readouterr() == ("", "")  # Dask itself says nothing
    assert (os.environ.get("OMP_NUM_THREADS"), os.environ["MKL_NUM_THREADS"]) == (None, "2")
    assert os.environ.get("PYTHONHASHSEED") == before


def test_workers_offer_to_redis_write_back_to_a_bucket_and_count_as_this_process_does(
    bench: Bench, alone: dict[str, str], s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What opens Redis and the bucket is in the workers' environment, and in nothing that is sent to them."""
    sent: list[bytes] = []
    submit = distributed.Client.submit

    def submitted(client: distributed.Client, *args: Any, **options: Any) -> Any:
        sent.append(pickle.dumps(args))
        return submit(client, *args, **options)

    monkeypatch.setattr(distributed.Client, "submit", submitted)
    shared = s3.url(f"dask/{tmp_path.name}")
    with redis_server(tmp_path / "redis", ["--requirepass", "hunter2"]) as server:
        url = server.url.replace("//", "//:hunter2@")
        monkeypatch.setenv("PROTEUS_REDIS_URL", url)
        bench.places = Places(str(bench.path), shared, write_back=True)
        with counting(lambda: tmp_path / "metrics"):
            here = EmbeddingCache(bench.path, shared=shared, redis=RedisClient(url))
            outcome = bench.run(LOCAL, cache=here)
        assert (outcome.computed, outcome.workers) == (len(alone), 2)
        third = EmbeddingCache(tmp_path / "third", redis=RedisClient(url))
        keys = {RECIPE.key(bench.trunk, s): s for s in bench.proteins.values()}
        assert third.hot
        run = third.hot.run(bench.trunk, RECIPE)
        assert run and {v.key for v in run.fetch(keys, [])} == alone.keys()
        assert {use.redis["put"] for use in uses(bench.path)} == {len(alone)}
    assert sent and not any(secret in data for data in sent for secret in (b"hunter2", SECRET_KEY.encode()))
    theirs = EmbeddingCache(tmp_path / "fourth", shared=shared)
    assert {e.key: e.content for e, _ in theirs.find(alone)} == alone
    counted = {name: value for name, _, value in by_name(CountsFile(tmp_path / "metrics").totals())}
    assert counted["proteus_embedding_tokens_total"] == outcome.tokens
    assert counted["proteus_embedding_compute_seconds_sum"] > 0


@pytest.mark.torture
def test_a_worker_is_killed(bench: Bench, alone: dict[str, str], caplog: pytest.LogCaptureFixture):
    killed: list[int] = []

    def kill() -> None:
        victim = worker_processes()[0]
        victim.kill()
        killed.append(victim.pid)

    told = Told(len(alone) // 4, kill)
    outcome = bench.run(replace(LOCAL, workers=4 if TORTURE else 2), told)
    assert killed
    assert {e.key: e.content for e in outcome.entries} == alone
    check_all_there_none_twice(bench, alone)
    assert told.done == len(alone)


@pytest.fixture
def poisoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Sequence[str], Sequence[str]], None]]:
    def poison(kills: Sequence[str], fails: Sequence[str]) -> None:
        monkeypatch.setenv("TEST_KILLS", " ".join(kills))
        monkeypatch.setenv("TEST_FAILS", " ".join(fails))
        monkeypatch.setenv("TEST_ATTEMPTS", str(tmp_path / "attempts"))

    assert distributed.__name__ in dask.config.config
    with dask.config.set({"distributed.worker.preload": [str(Path(__file__).with_name("poison.py"))]}):
        yield poison


def test_a_shard_that_kills_its_workers_is_tried_3_times_and_the_rest_completes(
    bench: Bench, alone: dict[str, str], poisoned: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    # Many shards, and one of each kind: which sequences share a shard is by their keys.
    named = {RECIPE.key(bench.trunk, sequence): name for name, sequence in bench.proteins.items()}
    divided = shards({key: bench.proteins[name] for key, name in named.items()}, RECIPE, 500)
    killer, failing = (named[next(iter(divided[n]))] for n in (1, -2))
    poisoned([bench.proteins[killer]], [bench.proteins[failing]])
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ClusterError, match=r"2 of .* shards could not be computed") as caught,
    ):
        bench.run(replace(LOCAL, shard_tokens=500))
    attempts = Counter((tmp_path / "attempts").read_text().split())
    assert attempts == {bench.proteins[killer]: 3, bench.proteins[failing]: 3}
    told = [record.getMessage() for record in caplog.records]
    (of_killer,) = [line for line in told if "killed its worker 3 times; its sequences" in line]
    (of_failing,) = [line for line in told if "failed 3 times (MemoryError: no room for this one)" in line]
    assert killer in of_killer
    assert failing in of_failing
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    lost = {
        name.strip("'") for line in (of_killer, of_failing) for name in line.partition("its sequences: ")[2].split(", ")
    }
    assert "killed its worker 3 times; shard" in str(
        caught.value
    ) or "MemoryError: no room for this one); shard" in str(caught.value)
    here = {RECIPE.key(bench.trunk, s) for name, s in bench.proteins.items() if name not in lost}
    assert bench.stored() == dict.fromkeys(here, 1)
    assert bench.contents() == {key: alone[key] for key in here}
    assert len(here) > len(alone) // 2


def test_what_is_wrong_everywhere_is_said_once(bench: Bench, registry: Path):
    bench.weights = replace(bench.weights, trunk="0" * 32)
    told = Told()
    with pytest.raises(IntegrityError, match=f"has trunk {bench.trunk} on .*, and the run asks for {'0' * 32}"):
        bench.run(replace(LOCAL, workers=1), told)
    assert (told.done, bench.stored()) == (0, {})


# A scheduler that somebody else keeps.


def given(cluster: DaskCluster) -> ClusterOptions:
    return ClusterOptions("scheduler", shard_tokens=1000, scheduler=cluster.address, **cluster.tls)


@pytest.mark.torture
def test_the_scheduler_is_killed_and_the_next_run_goes_on(bench: Bench, alone: dict[str, str], tmp_path: Path):
    with dask_cluster(tmp_path / "dask", 4 if TORTURE else 2) as cluster:
        told = Told(len(alone) // 4, cluster.scheduler.kill)
        began = time.monotonic()
        with pytest.raises(
            ClusterError, match=f"scheduler of {cluster.address} is gone; start it and its workers again"
        ):
            bench.run(given(cluster), told)
        assert time.monotonic() - began < (240 if TORTURE else 60)
        before = bench.stored()
        assert 0 < len(before) < len(alone)
        cluster.kill()
        cluster.start()
        outcome = bench.run(given(cluster))
    assert {e.key: e.content for e in outcome.entries} == alone
    assert outcome.hits >= len(before)
    assert 1 <= outcome.workers <= len(cluster.workers)
    check_all_there_none_twice(bench, alone)


class Lost:
    """A future whose scheduler goes once its status was asked for: what it returned, or raised, can't be fetched any more."""

    def __init__(self, status: str, error: BaseException | None) -> None:
        self.status, self._error = status, error

    def result(self) -> Any:
        raise self._error or CancelledError

    def exception(self) -> Any:
        if self._error:
            raise self._error


@pytest.mark.parametrize("status", ["finished", "error", "cancelled", "lost"])
@pytest.mark.parametrize(
    "error", [CancelledError(), OSError("Timed out"), None], ids=["cancelled", "timeout", "nothing"]
)
def test_a_scheduler_that_goes_before_a_result_is_fetched_is_gone(status: str, error: BaseException | None):
    run = dask_engine._Run(Running(None, lambda: None, "tls://node1:8786"), None, 1.0, None, [])  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="the scheduler of tls://node1:8786 is gone; start it and its workers again"):
        run._take(Lost(status, error), dask_engine._Shard(1, {}))  # type: ignore[arg-type]


def test_a_result_that_was_lost_with_its_worker_and_failed_when_tried_again_is_a_failure():
    class Again(Lost):
        def result(self) -> Any:
            self.status = "error"
            return super().result()

        def exception(self) -> Any:
            return self._error

    shard = dask_engine._Shard(1, {})
    run = dask_engine._Run(Running(None, lambda: None, "x"), None, 1.0, None, [])  # type: ignore[arg-type]
    run._take(Again("finished", OSError("no space")), shard)  # type: ignore[arg-type]
    assert (shard.attempts, shard.why) == (1, "failed 1 times (OSError: no space)")


def test_a_scheduler_that_hangs_ends_the_run(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dask_engine, "_SILENT_S", 3.0, raising=False)
    with dask_cluster(tmp_path / "dask", 1) as cluster:
        # A stopped one resumes, so that a run which waits for it fails here, and does not hang.
        resuming = threading.Timer(60, cluster.scheduler.resume)
        resuming.start()
        try:
            with pytest.raises(ClusterError, match=f"scheduler of {cluster.address} is gone"):
                bench.run(given(cluster), Told(1, cluster.scheduler.pause))
        finally:
            resuming.cancel()
            cluster.scheduler.resume()
    assert bench.stored()


def test_who_has_no_certificate_gets_no_answer(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clusters, "_ANSWERS_S", 3.0)
    with dask_cluster(tmp_path / "dask", 0) as cluster:
        other = ClusterOptions("scheduler", scheduler=cluster.address, **certificates(tmp_path / "other"))
        plain = ClusterOptions("scheduler", scheduler=cluster.address.replace("tls", "tcp"), insecure=True)
        for options in (other, plain):
            with pytest.raises(ClusterError, match=f"no scheduler answers at {options.scheduler}") as caught:
                bench.run(options)
            assert "\n" not in str(caught.value)
        waiting = replace(given(cluster), wait_minutes=0.02)
        with pytest.raises(ClusterError, match=r"had no worker for 0.02 minutes"):
            bench.run(waiting)
    with pytest.raises(ClusterError, match=f"no scheduler answers at {cluster.address}"):
        bench.run(given(cluster))


# What a worker refuses; called here as a function.


@pytest.fixture
def task(bench: Bench) -> Iterator[Task]:
    with EmbeddingCache(bench.path).hold() as lease:
        assert lease.name
        yield Task(bench.weights, RECIPE, Places(str(bench.path)), lease.name, "")


def shard(bench: Bench, number: int = 2) -> dict[str, str]:
    return {RECIPE.key(bench.trunk, s): s for s in list(bench.proteins.values())[:number]}


def test_a_task_asks_first_whether_its_entries_are_there(bench: Bench, task: Task, alone: dict[str, str]):
    first, again = compute_shard(task, shard(bench)), compute_shard(task, shard(bench, 3))
    assert (first.computed, first.found, again.computed, again.found) == (2, 0, 1, 2)
    assert bench.stored() == dict.fromkeys(shard(bench, 3), 1)
    assert bench.contents().items() <= alone.items()


def test_a_damaged_entry_is_computed_again_and_served(bench: Bench, task: Task, alone: dict[str, str]):
    compute_shard(task, shard(bench, 1))
    (segment,) = (bench.path / "seg").iterdir()
    (entry,) = (e for found in EmbeddingCache(bench.path).candidates(list(shard(bench, 1))).values() for e in found)
    data = bytearray(segment.read_bytes())
    data[entry.offset] ^= 1
    segment.write_bytes(data)
    assert compute_shard(task, shard(bench, 1)).computed == 1
    cache = EmbeddingCache(bench.path)
    with cache.hold() as lease:
        found = dask_engine._published(Work(bench.trunk, RECIPE, cache, shard(bench, 1), 0, lease, None, 1, 0))
    assert {key: e.content for key, e in found.items()} == {entry.key: alone[entry.key]}


def test_a_worker_of_another_revision_or_device_class_computes_nothing(bench: Bench, task: Task):
    other = replace(task, recipe=replace(RECIPE, engine=RECIPE.engine + 1))
    with pytest.raises(ConfigError, match="install the same proteus_pipeline there"):
        compute_shard(other, shard(bench))
    with pytest.raises(
        ConfigError, match=r"cache.accept=same_class: the worker on .* is cpu/.*, this machine cuda/sm_90"
    ):
        compute_shard(replace(task, only_class="cuda/sm_90"), shard(bench))
    assert compute_shard(replace(task, only_class=attested("cpu")[0]), shard(bench, 1)).computed == 1


def test_a_worker_with_another_folder_in_the_caches_place_computes_nothing(
    bench: Bench, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shard_task, "_VISIBLE_S", 0.0)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(StorageError, match=r"does not see this run's cache, .*elsewhere; set cache.path to a folder"):
        compute_shard(replace(task, places=Places(str(tmp_path / "elsewhere"))), shard(bench))
    gone = replace(task, weights=replace(task.weights, home=str(tmp_path / "nowhere")))
    with pytest.raises(StorageError, match=r"does not see .*nowhere; keep the project in a folder"):
        compute_shard(gone, shard(bench))


def test_a_worker_that_could_lock_the_runs_lease_computes_nothing(bench: Bench, task: Task, tmp_path: Path):
    # A mount that keeps locks to its node: the file is there, and seems to be nobody's.
    other = EmbeddingCache(tmp_path / "other")
    with other.hold() as lease:
        assert lease.name
        data = (other.path / lease.name).read_bytes()
    (other.path / lease.name).write_bytes(data)
    with pytest.raises(StorageError, match=r"do not reach from the run's node to .*; mount it with flock"):
        compute_shard(replace(task, places=Places(str(other.path)), lease=lease.name), shard(bench))
    assert (other.path / lease.name).read_bytes() == data


def test_what_workers_published_elsewhere_is_missed_in_time(bench: Bench):
    cache = EmbeddingCache(bench.path)
    with cache.hold() as lease, pytest.raises(StorageError, match="2 embeddings that workers published are not seen"):
        dask_engine._published(Work(bench.trunk, RECIPE, cache, shard(bench), 0, lease, None, 2, 0), patience=0.0)


# Real SLURM.

needs_slurm = pytest.mark.skipif(bool(missing()), reason=missing())
JOBS = ClusterOptions("slurm", shard_tokens=1000, workers=2, cores=1, memory="1GB", walltime="00:10:00")


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    with slurm(tmp_path / "slurm") as cluster:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        yield cluster


@needs_slurm
@pytest.mark.torture
def test_a_slurm_job_is_cancelled(bench: Bench, alone: dict[str, str], jobs: Slurm):
    cancelled: list[str] = []

    def cancel() -> None:
        # At full count all of them: the run has to ask for others.
        cancelled.extend(jobs.jobs("R") if TORTURE else jobs.jobs("R")[:1])
        jobs.ask("scancel", *cancelled)

    outcome = bench.run(JOBS, Told(len(alone) // 4, cancel))
    assert cancelled
    assert {e.key: e.content for e in outcome.entries} == alone
    check_all_there_none_twice(bench, alone)
    logs = bench.path.parent / "logs"
    assert sorted(path.suffix for path in logs.iterdir())[:2] == [".err", ".err"]  # and no certificate
    assert {path.suffix for path in logs.iterdir()} == {".err", ".out"}
    deadline = time.monotonic() + 60
    while jobs.jobs() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not jobs.jobs()


@needs_slurm
def test_a_job_that_slurm_does_not_take_is_refused_at_once(bench: Bench, jobs: Slurm):
    with pytest.raises(ClusterError, match=r"no cluster could be started .*'nowhere0'"):
        bench.run(replace(JOBS, interface="nowhere0"))
    for wrong in (replace(JOBS, queue="nowhere"), replace(JOBS, cores=999), replace(JOBS, directives=["--nonsense"])):
        with pytest.raises(ClusterError, match="SLURM does not take such a job: ") as caught:
            bench.run(wrong)
        assert "\n" not in str(caught.value)
    assert not jobs.jobs()


def test_a_worker_keeps_the_models_of_many_runs_within_one_budget(tmp_path: Path):
    """A scheduler's workers live for weeks: a cache for each version that ever ran there would fill them."""
    manager = ModelVersionManager(tmp_path / "registry")
    for number in range(3):
        write_folder(make_checkpoint(seed=number), tmp_path / f"{number}")
        version = manager.register_version(
            ModelInterface("m", manager, weights=tmp_path / f"{number}"), f"{number + 1}.0.0"
        )
        trunk = version.checkpoint.trunk_digest
        weights = Weights(str(manager.root), version.reference, trunk, "cpu", 0.1, 1, 64)
        for precision in ("fp32", "mixed"):
            shard_task._encoder(weights, replace(RECIPE, precision=precision), "cpu")
    gc.collect()
    caches = [o for o in gc.get_objects() if type(o) is ModelCacheManager]
    assert len([c for c in caches if c._bindings.manager.root == manager.root]) == 1
