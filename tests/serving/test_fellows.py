"""Model caches on one Redis: what one invalidates no other one serves, they count together, and load one at a time."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from conftest import git, make_checkpoint
from redis_server import RedisServer, redis_server

from proteus_pipeline import ModelCacheManager, ModelInterface, ModelVersionManager
from proteus_pipeline.errors import CacheInvalidationError, ConfigError, StorageError, VersionNotFoundError
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.serving import fellows
from proteus_pipeline.serving.fellows import STALE_S, Fellows
from proteus_pipeline.stores.redis import RedisClient
from proteus_pipeline.stores.redis_connection import TRIP_S

# A look-up that asks Redis, and finds it hung: two round trips at the longest, and what a busy machine adds.
BOUND_S = 2 * TRIP_S + 3.0
FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(one_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    redis.Redis.from_url(one_server.url).flushall()
    monkeypatch.setenv("PROTEUS_REDIS_URL", one_server.url)
    return one_server


@pytest.fixture
def registry(repository: Path, tmp_path: Path) -> ModelVersionManager:
    manager = ModelVersionManager(repository)
    for version, seed in (("1.0.0", 0), ("1.1.0", 1)):
        write_folder(make_checkpoint(seed=seed), tmp_path / f"{seed}")
        manager.register_version(ModelInterface("m", manager, weights=tmp_path / f"{seed}"), version)
    return manager


@pytest.fixture
def clone(registry: ModelVersionManager, repository: Path, tmp_path: Path) -> Path:
    """Another clone of the repository, with its own copy of the weights; one git remote for both."""
    remote, other = tmp_path / "remote.git", tmp_path / "another clone"
    subprocess.run(["git", "init", "--quiet", "--bare", remote], check=True)
    git(repository, "remote", "add", "origin", str(remote))
    git(repository, "push", "--quiet", "origin", "main", "--tags")
    shutil.copytree(repository, other)
    return other


def means(cache: ModelCacheManager) -> str:
    return cache.get_or_load("m").reference


def after_a_while() -> None:
    time.sleep(STALE_S + 0.1)


def test_a_rollback_in_one_clone_is_seen_by_a_cache_in_another_process_and_clone(
    registry: ModelVersionManager, repository: Path, clone: Path, server: RedisServer
):
    code = (
        "import sys\n"
        "from proteus_pipeline import ModelCacheManager, ModelVersionManager\n"
        "cache = ModelCacheManager(distributed=True, version_manager=ModelVersionManager(sys.argv[1]))\n"
        "for line in sys.stdin: print(cache.get_or_load('m').reference, flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent.parent)}
    command = [sys.executable, "-c", code, str(clone)]
    mine = ModelCacheManager(distributed=True, version_manager=registry)
    assert means(mine) == "m@v1.1.0"
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as other:
        assert other.stdin and other.stdout

        def asked() -> str:
            assert other.stdin and other.stdout
            other.stdin.write("\n")
            other.stdin.flush()
            return other.stdout.readline().strip()

        assert asked() == "m@v1.1.0"
        for version in ("1.0.0", "1.1.0"):
            registry.rollback("m", version)
            git(repository, "push", "--quiet", "origin", "--tags")
            assert asked() != f"m@v{version}"  # nobody has told it
            mine.invalidate("m")
            told = time.monotonic()
            while asked() != f"m@v{version}":
                assert time.monotonic() - told < STALE_S + BOUND_S + 10  # and git's fetch
                time.sleep(0.05)
            assert means(mine) == f"m@v{version}"
        other.stdin.close()
        assert other.wait(30) == 0


def test_what_one_invalidates_the_others_let_go_of(registry: ModelVersionManager, clone: Path, server: RedisServer):
    one = ModelCacheManager(distributed=True, version_manager=registry)
    two = ModelCacheManager(distributed=True, version_manager=ModelVersionManager(clone))
    for cache in (one, two):
        cache.preload("m@v1.0.0", "m")
    assert one.invalidate("m@v1.0.0") == 1
    after_a_while()
    assert two.get_cached_model("m") is None  # all of the name: which version was meant is not told
    assert two.get_cache_stats()["evictions"]["invalidated"] == 2
    assert one.get_cached_model("m") is not None  # who told does not listen to itself
    after_a_while()
    two.preload("m")
    assert two.get_cache_stats()["evictions"]["invalidated"] == 2  # once


def test_a_loss_of_redis_memory_makes_all_look_again(
    registry: ModelVersionManager, server: RedisServer, caplog: pytest.LogCaptureFixture
):
    one = ModelCacheManager(distributed=True, version_manager=registry)
    two = ModelCacheManager(distributed=True, version_manager=registry)
    two.preload("m")
    one.invalidate("m")
    after_a_while()
    two.preload("m")
    redis.Redis.from_url(server.url).flushall()  # with it an invalidation may be lost
    after_a_while()
    two.preload("m")
    assert two.get_cache_stats()["evictions"]["invalidated"] == 2
    assert not caplog.records


@pytest.mark.parametrize("how", ["dead", "hung"])
def test_without_redis_it_is_a_cache_like_another_with_one_warning(
    registry: ModelVersionManager, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
):
    with redis_server(tmp_path / "redis") as server:
        cache = ModelCacheManager(distributed=True, version_manager=registry, redis_url=server.url)
        assert means(cache) == "m@v1.1.0"
        server.kill() if how == "dead" else server.pause()
        for version in ("1.0.0", "1.1.0"):
            registry.rollback("m", version)
            after_a_while()
            began = time.monotonic()
            assert means(cache) == f"m@v{version}"
            stats = cache.get_cache_stats()
            assert time.monotonic() - began < BOUND_S
            assert stats["shared"] is None
        assert stats["loads"] == 2
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert cache.invalidate("m") == 2  # here it is
        assert "was not told that m is invalidated" in caplog.text


def test_all_count_together(registry: ModelVersionManager, server: RedisServer):
    one = ModelCacheManager(distributed=True, version_manager=registry)
    two = ModelCacheManager(distributed=True, version_manager=registry)
    for cache in (one, two, two):
        cache.preload("m")
    one.get_cache_stats()
    shared = two.get_cache_stats()["shared"]
    assert shared == {"hits": 1, "misses": 2, "loads": 2, "restored": 0, "load_failures": 0, "evictions": 0}
    assert one.get_cache_stats()["shared"] == shared  # told once
    # What a cache counted last is not lost with it.
    two.preload("m")
    del two, cache
    assert one.get_cache_stats()["shared"]["hits"] == 2
    assert ModelCacheManager(version_manager=registry).get_cache_stats()["shared"] is None


def test_what_can_not_be_looked_at_anew_is_an_error_until_it_can(
    registry: ModelVersionManager, server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    cache = ModelCacheManager(distributed=True, version_manager=registry)
    cache.preload("m")
    ModelCacheManager(distributed=True, version_manager=registry).invalidate("m")
    after_a_while()
    broken = StorageError("the disk is gone", "find it")

    def gone(name: str) -> None:
        raise broken

    with monkeypatch.context() as patch:
        patch.setattr(registry, "list_versions", gone)
        for _ in range(2):
            with pytest.raises(CacheInvalidationError, match="the disk is gone"):
                cache.get_cached_model("m")
    assert cache.get_cached_model("m") is None  # and not what was invalidated
    assert cache.get_cache_stats()["evictions"]["invalidated"] == 1


def test_a_remote_that_can_not_be_reached_is_said_and_stops_nothing(
    registry: ModelVersionManager,
    repository: Path,
    server: RedisServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    git(repository, "remote", "add", "origin", str(repository / "nowhere"))
    monkeypatch.setenv("PROTEUS_GIT_REMOTE", "https://ada:hunter2@127.0.0.1:1/group.git")
    cache = ModelCacheManager(distributed=True, version_manager=registry)
    cache.preload("m")
    ModelCacheManager(distributed=True, version_manager=registry).invalidate("m")
    after_a_while()
    assert cache.get_cached_model("m") is None
    assert "could not be fetched from origin" in caplog.text
    assert "could not be fetched from https://127.0.0.1:1/group.git: " in caplog.text
    assert "hunter2" not in caplog.text


def test_one_process_loads_at_a_time_and_nobody_waits_for_a_dead_one(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fellows, "TURN_WAIT_S", 0.5)
    code = (
        "import sys, time\n"
        "from proteus_pipeline.serving.fellows import Fellows\n"
        "with Fellows.at(sys.argv[1]).turn('d'): print('loading', flush=True); time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent.parent)}
    with subprocess.Popen([sys.executable, "-c", code, server.url], stdout=-1, text=True, env=environment) as other:
        assert other.stdout and other.stdout.readline() == "loading\n"
        other.kill()
    began = time.monotonic()
    with Fellows.at(server.url).turn("d"):
        assert 0.5 <= time.monotonic() - began < 0.5 + BOUND_S  # the dead one's lease; and then all the same
    monkeypatch.setattr(fellows, "TURN_WAIT_S", 60.0)
    began = time.monotonic()
    with Fellows.at(server.url).turn("another model"):
        assert time.monotonic() - began < BOUND_S


def test_loads_take_turns(registry: ModelVersionManager, server: RedisServer):
    client = RedisClient(server.url)
    cache = ModelCacheManager(distributed=True, version_manager=registry)
    version = registry.get_version("m", "1.1.0")
    assert version.record
    with Fellows(client).turn(version.record.model_digest):
        from threading import Thread

        thread = Thread(target=cache.get_or_load, args=("m",))
        thread.start()
        time.sleep(1.0)
        assert cache.get_cache_stats()["loads"] == 0
    thread.join(10)
    assert cache.get_cache_stats()["loads"] == 1
    assert cache.get_cache_stats()["load_seconds"]["p95"] < 1.0  # what was waited for is not the source's


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"distributed": True}, "distributed=True needs a Redis, and none is named; set PROTEUS_REDIS_URL, or give redis_url="),
        ({"distributed": True, "redis_url": "http://ada:hunter2@x"}, "the URL of Redis is none that begins with redis://"),
        ({"distributed": "redis"}, "distributed is 'redis'; use True or False"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(registry: ModelVersionManager, options: dict[str, object], said: str):
    with pytest.raises(ConfigError) as refused:
        ModelCacheManager(version_manager=registry, **options)  # type: ignore[arg-type]
    assert str(refused.value).startswith(said)
    assert "hunter2" not in str(refused.value)


def test_names_that_mean_nothing_are_not_asked_about_for_ever(registry: ModelVersionManager, server: RedisServer):
    cache = ModelCacheManager(distributed=True, version_manager=registry)
    cache.preload("m")
    for number in range(20):
        assert cache.get_cached_model(f"nobody{number}") is None
        with pytest.raises(VersionNotFoundError):
            cache.get_or_load(f"nobody{number}@v1.0.0")
    assert cache._fellows is not None and set(cache._fellows._heard) == {"m"}


def test_distributed_stays_as_it_was_made(registry: ModelVersionManager, server: RedisServer):
    cache = ModelCacheManager(distributed=True, version_manager=registry)
    assert cache.update_cache_config({"distributed": True, "patience": 3}).patience == 3
    with pytest.raises(ConfigError, match="can't become False now; make another ModelCacheManager"):
        cache.update_cache_config({"distributed": False})
