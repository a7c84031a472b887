"""The right model, within the budget, loaded once; in a real registry, of small models."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import git, make_checkpoint
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from proteus_pipeline import ModelCacheManager, ModelInterface, ModelVersionManager
from proteus_pipeline.errors import (
    CacheInvalidationError,
    CacheMemoryError,
    ConfigError,
    IntegrityError,
    InvalidVersionError,
    StorageError,
    VersionNotFoundError,
)
from proteus_pipeline.models import reading
from proteus_pipeline.models.encoder import activation_bytes, weight_bytes
from proteus_pipeline.models.esm2 import Esm2Encoder
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.serving import residence
from proteus_pipeline.serving.flights import FIRST_BACK_OFF

PROTEIN = "MKTAYIAKQR"
TOKENS = 64


@pytest.fixture
def registry(repository: Path, tmp_path: Path) -> ModelVersionManager:
    """A model of two versions, of which v1.1.0 is current, and another one of other weights."""
    manager = ModelVersionManager(repository)
    for name, version, seed in (("m", "1.0.0", 0), ("m", "1.1.0", 1), ("lab/n", "1.0.0", 2)):
        write_folder(make_checkpoint(seed=seed), tmp_path / f"{seed}")
        manager.register_version(ModelInterface(name, manager, weights=tmp_path / f"{seed}"), version)
    return manager


@pytest.fixture
def cache(registry: ModelVersionManager) -> ModelCacheManager:
    return ModelCacheManager(version_manager=registry)


def room_for(count: float) -> float:
    """Return a limit in GB that holds so many of the small models, and a usual call with one."""
    architecture, threads = make_checkpoint().architecture, torch.get_num_threads()
    call = activation_bytes(architecture, [TOKENS - 2] * (threads + 1), tokens=TOKENS, threads=threads)
    return (count * weight_bytes(architecture, "fp32") + call) / 1e9


def residues_for(count: float) -> int:
    """Return of how many residues a call takes what a usual one does, and so many of the small models."""
    architecture, threads = make_checkpoint().architecture, torch.get_num_threads()
    sizes = (activation_bytes(architecture, [n], tokens=TOKENS, threads=threads) for n in range(1, 10_000))
    return next(n for n, nbytes in enumerate(sizes, 1) if nbytes >= 1e9 * room_for(count))


def test_a_name_means_its_current_version_and_a_miss_is_none(cache: ModelCacheManager, registry: ModelVersionManager):
    assert cache.get_cached_model("m") is None
    assert cache.get_cached_model("nobody") is None
    cached = cache.cache_model(ModelInterface("m", registry))
    assert cached.reference == "m@v1.1.0"
    found = cache.get_cached_model("m")
    assert found is not None
    assert found.version is not None
    assert (found.reference, found.version.version) == ("m@v1.1.0", "1.1.0")
    assert cache.get_cached_model("m@v1.0.0") is None
    assert np.array_equal(found.embed([PROTEIN])[0], ModelInterface("m@v1.1.0", registry).embed([PROTEIN])[0])
    stats = cache.get_cache_stats()
    assert (stats["loads"], stats["misses"]) == (1, 4)
    assert stats["hits"] == 1


def test_a_rollback_shows_at_the_next_look(cache: ModelCacheManager, registry: ModelVersionManager):
    cache.preload("m@v1.0.0", "m@v1.1.0")
    for version in ("1.0.0", "1.1.0", "1.0.0", "1.1.0"):
        registry.rollback("m", version)
        found = cache.get_cached_model("m")
        assert found is not None
        assert found.reference == f"m@v{version}"


def test_another_process_moves_a_name_and_no_older_model_is_served(
    cache: ModelCacheManager, registry: ModelVersionManager, repository: Path
):
    cache.cache_model(ModelInterface("m", registry))
    time.sleep(0.15)  # so that the registry's state can be remembered
    assert cache.get_cached_model("m") is not None
    ModelVersionManager(repository).rollback("m", "1.0.0")  # it shares nothing with the cache's own
    assert cache.get_cached_model("m") is None
    assert cache.get_or_load("m").reference == "m@v1.0.0"
    ModelVersionManager(repository).delete_version("m", "1.1.0")
    with pytest.raises(VersionNotFoundError, match=r"m has no version v1\.1\.0"):
        cache.get_or_load("m@v1.1.0")
    assert cache.get_cached_model("m@v1.1.0") is None


def test_a_name_with_nothing_new_costs_no_git(
    cache: ModelCacheManager, registry: ModelVersionManager, monkeypatch: pytest.MonkeyPatch
):
    cache.get_or_load("lab/n")
    time.sleep(0.15)
    cache.get_or_load("lab/n")
    monkeypatch.setattr(registry, "resolve", lambda _: pytest.fail("git was asked"))
    assert cache.get_cached_model("lab/n") is not None


def test_a_version_of_another_name_moves_nothing_else(cache: ModelCacheManager, registry: ModelVersionManager):
    cache.get_or_load("lab/n")
    registry.rollback("m", "1.0.0")
    assert cache.get_cached_model("lab/n") is not None


def test_a_registry_that_cant_be_read_serves_nothing(
    cache: ModelCacheManager, registry: ModelVersionManager, repository: Path
):
    cache.cache_model(ModelInterface("m", registry))
    (repository / ".git").rename(repository / "gone")
    (repository / ".git").mkdir()
    for ask in (cache.get_cached_model, cache.get_or_load, cache.invalidate):
        with pytest.raises(CacheInvalidationError, match="nobody can tell which version"):
            ask("m")


def test_weights_that_are_not_registered_are_cached_by_their_name_until_it_is(
    cache: ModelCacheManager, registry: ModelVersionManager, tmp_path: Path
):
    write_folder(make_checkpoint(seed=5), tmp_path / "new")
    new = ModelInterface("new", registry, weights=tmp_path / "new")
    cached = cache.cache_model(new)
    assert cached.version is None
    found = cache.get_cached_model("new")
    assert found is not None
    assert np.array_equal(found.embed([PROTEIN])[0], new.embed([PROTEIN])[0])
    registry.register_version(new, "1.0.0")
    found = cache.get_cached_model("new")
    assert found is not None
    assert found.reference == "new@v1.0.0"  # the same weights: nothing is loaded again
    assert cache.get_cache_stats()["loads"] == 1


def test_a_cold_burst_is_one_load_and_all_get_the_same(cache: ModelCacheManager):
    gate = threading.Barrier(32)

    def ask(_: int) -> bytes:
        gate.wait()
        with cache.lease("m") as model:
            return model.embed([PROTEIN])[0].tobytes()

    with ThreadPoolExecutor(32) as pool:
        assert len(set(pool.map(ask, range(32)))) == 1
    stats = cache.get_cache_stats()
    assert (stats["loads"], stats["leases"]) == (1, 0)


def test_a_failed_load_fails_all_and_is_tried_again_after_a_pause(
    cache: ModelCacheManager, registry: ModelVersionManager, monkeypatch: pytest.MonkeyPatch
):
    opened = []

    def fails(*_: object, **__: object) -> None:
        opened.append(1)
        time.sleep(0.05)
        raise StorageError("the disk is away", "plug it in")

    monkeypatch.setattr(residence, "make_encoder", fails)
    gate = threading.Barrier(8)

    def ask(_: int) -> str:
        gate.wait()
        with pytest.raises(StorageError) as caught:
            cache.get_or_load("m")
        return str(caught.value)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {"the disk is away; plug it in"}
    assert len(opened) == 1
    monkeypatch.undo()
    with pytest.raises(StorageError):
        cache.get_or_load("m")  # within the pause
    assert cache.get_cached_model("m") is None
    time.sleep(FIRST_BACK_OFF)
    assert cache.get_or_load("m").reference == "m@v1.1.0"
    assert cache.get_cache_stats()["load_failures"] == 1


def test_the_least_recently_used_goes_and_a_lease_keeps(registry: ModelVersionManager):
    cache = ModelCacheManager(room_for(2.5), version_manager=registry, tokens_per_batch=TOKENS)
    one, two, three = "m@v1.0.0", "m@v1.1.0", "lab/n"
    cache.preload(one, two)
    cache.get_cached_model(one)
    cache.get_or_load(three)
    assert cache.get_cached_model(two) is None
    with cache.lease(one) as model:
        cache.get_or_load(two)
        cache.get_or_load(three)
        assert cache.get_cached_model(one) is not None
        model.embed([PROTEIN])
    stats = cache.get_cache_stats()
    assert stats["bytes"] <= stats["limit_bytes"]
    assert stats["evictions"]["room"] == 3


def test_a_model_larger_than_the_budget_lets_nothing_go(registry: ModelVersionManager, tmp_path: Path):
    write_folder(make_checkpoint(width=128), tmp_path / "large")
    cache = ModelCacheManager(room_for(2.5), version_manager=registry, tokens_per_batch=TOKENS)
    cache.preload("m@v1.0.0", "m@v1.1.0")
    large = ModelInterface("large", registry, weights=tmp_path / "large")
    with pytest.raises(
        CacheMemoryError,
        match=r"large takes 1.74 MB and a usual call with it \S+ MB, and the limit is \S+ MB \(max_memory_gb\); set max_",
    ):
        cache.cache_model(large)
    assert len(cache.get_cache_stats()["models"]) == 2


def test_leases_that_leave_no_room_are_waited_for_and_then_named(registry: ModelVersionManager):
    cache = ModelCacheManager(room_for(1.5), version_manager=registry, patience=0.3, tokens_per_batch=TOKENS)
    with (
        cache.lease("m@v1.0.0"),
        pytest.raises(
            CacheMemoryError,
            match=r"m@v1.1.0 takes \S+ MB and .*, and of \S+ MB there are \S+ MB in use, \S+ MB for calls; end a lease",
        ),
    ):
        cache.get_or_load("m@v1.1.0")
    with ThreadPoolExecutor(1) as pool, cache.lease("m@v1.0.0"):
        waits = pool.submit(cache.get_or_load, "m@v1.1.0")
        time.sleep(0.1)
        assert not waits.done()
    assert waits.result().reference == "m@v1.1.0"


def test_calls_wait_for_each_others_room_and_one_can_always_begin(
    registry: ModelVersionManager, monkeypatch: pytest.MonkeyPatch
):
    cache = ModelCacheManager(room_for(2.2), version_manager=registry, patience=60, tokens_per_batch=TOKENS)
    models = [cache.get_or_load(name) for name in ("m@v1.0.0", "m@v1.1.0")]
    sequences = [PROTEIN * 6] * 12  # as many as a usual call has under way
    usual = cache.get_cache_stats()["devices"]["cpu"]["calls_bytes"]
    under_way, most = set[int](), 0
    compute = Esm2Encoder.compute

    def watched(*args: object, **kwargs: object) -> Iterator[object]:
        nonlocal most
        under_way.add(threading.get_ident())
        most = max(most, len(under_way))
        time.sleep(0.05)
        yield from compute(*args, **kwargs)  # type: ignore[arg-type]
        under_way.discard(threading.get_ident())

    monkeypatch.setattr(Esm2Encoder, "compute", watched)
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda i: models[i % 2].embed(sequences)[0].tobytes(), range(8)))
    assert most == 1
    assert done == [ModelInterface(m.reference, registry).embed(sequences)[0].tobytes() for m in models] * 4
    stats = cache.get_cache_stats()
    assert (stats["loads"], stats["devices"]["cpu"]["calls_bytes"]) == (2, usual)
    cache.update_cache_config({"max_memory_gb": 1})
    most = 0
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: models[i % 2].embed(sequences), range(8)))
    assert most > 1


def test_a_call_without_room_is_refused_with_the_numbers_and_lets_nothing_go(registry: ModelVersionManager):
    cache = ModelCacheManager(room_for(2.2), version_manager=registry, patience=0.1, tokens_per_batch=TOKENS)
    model, _ = cache.preload("m@v1.0.0", "m@v1.1.0")
    said = r"a call of m@v1\.0\.0 with 2 sequences of at most 20000 residues takes \S+ MB beside \S+ MB of weights, and the "
    with pytest.raises(CacheMemoryError, match=said):
        model.embed([PROTEIN, PROTEIN * 2000])
    long = "M" * residues_for(0.1)
    with pytest.raises(CacheMemoryError, match=rf"a call of .* with 1 sequence of at most {len(long)} residues"):
        model.contacts([long])
    assert len(cache.get_cache_stats()["models"]) == 2
    model.embed([long])


def test_a_call_lets_models_go_that_nobody_uses(registry: ModelVersionManager):
    cache = ModelCacheManager(room_for(2.5), version_manager=registry, tokens_per_batch=TOKENS)
    _, model = cache.preload("m@v1.0.0", "m@v1.1.0")
    model.embed(["M" * residues_for(1)])
    assert cache.get_cache_stats()["evictions"]["room"] == 1
    assert cache.get_cached_model("m@v1.1.0") is not None


def test_more_tokens_in_a_batch_are_room_too_and_refused_where_there_is_none(registry: ModelVersionManager):
    cache = ModelCacheManager(room_for(2.2), version_manager=registry, tokens_per_batch=TOKENS)
    cache.preload("m@v1.0.0", "m@v1.1.0")
    with (
        cache.lease("m@v1.0.0"),
        pytest.raises(CacheMemoryError, match="the old settings stand"),
    ):
        cache.update_cache_config({"tokens_per_batch": 4096})
    before = cache.get_cache_stats()
    assert len(before["models"]) == 2
    cache.update_cache_config({"tokens_per_batch": 1})
    assert cache.get_cache_stats()["bytes"] < before["bytes"]


def test_what_somebody_still_holds_counts_until_it_is_dropped(registry: ModelVersionManager):
    cache = ModelCacheManager(room_for(1.5), version_manager=registry, patience=0.1, tokens_per_batch=TOKENS)
    encoder = cache.get_or_load("m@v1.0.0").encoder()
    with pytest.raises(CacheMemoryError, match=r"there are \S+ MB let go and still held; "):
        cache.get_or_load("m@v1.1.0")
    assert cache.get_cache_stats()["devices"]["cpu"]["freeing_bytes"] > 0
    del encoder
    assert cache.get_or_load("m@v1.1.0").reference == "m@v1.1.0"
    assert cache.get_cache_stats()["devices"]["cpu"]["freeing_bytes"] == 0


def test_what_is_let_go_is_freed_at_once_and_loads_again_when_it_is_used(registry: ModelVersionManager):
    cache = ModelCacheManager(version_manager=registry, compression=False)
    gc.disable()
    try:
        model = cache.get_or_load("m")
        before = model.embed([PROTEIN])[0]
        cache.clear_cache()
        stats = cache.get_cache_stats()
        assert stats["bytes"] == 0
        assert np.array_equal(model.embed([PROTEIN])[0], before)
        assert cache.get_cache_stats()["loads"] == 2
    finally:
        gc.enable()


def test_invalidated_in_use_computes_on_and_is_served_no_more(cache: ModelCacheManager):
    with cache.lease("m") as model:
        assert cache.invalidate("m") == 1
        assert cache.get_cached_model("m") is None
        assert cache.get_cache_stats()["devices"]["cpu"]["freeing_bytes"] > 0
        del model
    assert cache.get_cache_stats()["bytes"] == 0
    assert cache.invalidate("m") == 0


def test_invalidate_takes_a_version_or_all_of_a_name(cache: ModelCacheManager):
    cache.preload("m@v1.0.0", "m@v1.1.0", "lab/n")
    assert cache.invalidate("m@v1.0.0") == 1
    assert cache.get_cached_model("m@v1.1.0") is not None
    cache.get_or_load("m@v1.0.0")
    assert cache.invalidate("m") == 2
    assert cache.get_cached_model("lab/n") is not None
    assert cache.get_cache_stats()["evictions"]["invalidated"] == 3


def test_ttl_lets_go_by_age(registry: ModelVersionManager):
    cache = ModelCacheManager(version_manager=registry, eviction_policy="ttl", ttl=0.3, compression=False)
    cache.get_or_load("m")
    assert cache.get_cached_model("m") is not None
    time.sleep(0.3)
    assert cache.get_cached_model("m") is None
    assert cache.get_cache_stats()["evictions"]["expired"] == 1


def test_settings_change_live_with_a_shrink_or_not_at_all(registry: ModelVersionManager):
    cache = ModelCacheManager(room_for(3.5), version_manager=registry, tokens_per_batch=TOKENS)
    cache.preload("m@v1.0.0", "m@v1.1.0", "lab/n")
    cache.get_cached_model("m@v1.0.0")
    settings = cache.update_cache_config({"max_memory_gb": room_for(1.5), "eviction_policy": "lru"})
    assert settings.max_memory_gb == room_for(1.5)
    stats = cache.get_cache_stats()
    assert stats["evictions"]["shrunk"] == 2
    assert stats["bytes"] <= stats["limit_bytes"]
    assert cache.get_cached_model("m@v1.0.0") is not None
    with (
        cache.lease("m@v1.0.0"),
        pytest.raises(CacheMemoryError, match=r"the new limit is \S+ MB; .*the old settings stand"),
    ):
        cache.update_cache_config({"max_memory_gb": room_for(0.5), "eviction_policy": "fifo"})
    assert cache.get_cache_stats()["limit_bytes"] == int(room_for(1.5) * 1e9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_memory_gb": 0}, "max_memory_gb is 0; use a number above 0, and at most 1,000,000"),
        ({"max_memory_gb": -1}, "max_memory_gb is -1; use a number above 0, and at most 1,000,000"),
        ({"max_memory_gb": "4"}, "max_memory_gb is '4'; use a number above 0, and at most 1,000,000"),
        ({"max_memory_gb": float("nan")}, "max_memory_gb is nan; use a number above 0, and at most 1,000,000"),
        ({"max_memory_gb": float("inf")}, "max_memory_gb is inf; use a number above 0, and at most 1,000,000"),
        ({"max_memory_gb": 1e300}, "max_memory_gb is 1e+300; use a number above 0, and at most 1,000,000"),
        ({"max_memory_gb": 10**400}, f"max_memory_gb is {10**400}; use a number above 0, and at most 1,000,000"),
        ({"max_memory_gb": True}, "max_memory_gb is True; use a number above 0, and at most 1,000,000"),
        ({"max_gpu_memory_gb": 0}, "max_gpu_memory_gb is 0; use a number above 0, and at most 1,000,000"),
        ({"eviction_policy": "random"}, "eviction policy 'random' is not known; use one of lru, lfu, fifo, ttl, cost"),
        ({"eviction_policy": "ttl"}, "eviction policy 'ttl' has no time to live; give its seconds with ttl"),
        ({"eviction_policy": "ttl", "ttl": 0}, "ttl=0 is no time to live; use a number of seconds above 0"),
        ({"ttl": 3}, "eviction policy 'lru' has no ttl; leave ttl out, or use the policy 'ttl'"),
        ({"compression": "yes"}, "compression is 'yes'; use True or False"),
        ({"patience": -1}, "patience is -1; use a number from 0, and at most 1,000,000"),
        ({"tokens_per_batch": 64.5}, "tokens_per_batch is 64.5; use a whole number, 1 or more"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0; use a whole number, 1 or more"),
        ({"tokens_per_batch": True}, "tokens_per_batch is True; use a whole number, 1 or more"),
    ],
)
def test_a_bad_value_is_refused_with_its_range_and_the_old_settings_serve(
    cache: ModelCacheManager, registry: ModelVersionManager, change: dict[str, object], said: str
):
    cache.get_or_load("m")
    before = cache.get_cache_stats()
    with pytest.raises(ConfigError) as caught:
        cache.update_cache_config({"compression": False} | change)
    assert str(caught.value) == said
    assert cache.get_cache_stats() == before
    assert cache._residence.settings.compression
    with pytest.raises(ConfigError) as caught:
        ModelCacheManager(version_manager=registry, **change)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "config", [{"max_memory": 3}, {"distributed": True}, {"distributed": "no"}, [("ttl", 3)], None]
)
def test_what_is_no_configuration_is_refused(cache: ModelCacheManager, config: object):
    with pytest.raises(ConfigError):
        cache.update_cache_config(config)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["m", 3, None])
def test_cache_model_takes_models(cache: ModelCacheManager, wrong: object):
    with pytest.raises(ConfigError, match=r"is (a name, not a model|no model)"):
        cache.cache_model(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a b", "m@^1"])
def test_a_name_that_breaks_the_grammar_is_refused(cache: ModelCacheManager, name: str):
    for ask in (cache.get_cached_model, cache.get_or_load, cache.invalidate):
        with pytest.raises(InvalidVersionError):
            ask(name)


def test_damaged_weights_are_an_error_and_take_no_room(cache: ModelCacheManager, repository: Path):
    for blob in (repository / ".dvc" / "cache").rglob("*"):
        if blob.is_file() and blob.stat().st_size > 10_000:
            blob.chmod(0o644)
            blob.write_bytes(blob.read_bytes()[:-4] + b"oops")
    with pytest.raises(IntegrityError, match="is damaged"):
        cache.get_or_load("m")
    assert cache.get_cache_stats()["bytes"] == 0


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/\n", {"memory.max": "1000000"}, 1_000_000),
        ("0::/system.slice/x.service\n", {"system.slice/x.service/memory.max": "2000000"}, 2_000_000),
        (
            "0::/a/b\n",
            {"a/b/memory.max": "max", "a/memory.max": "3000000", "memory.max": "4000000"},
            3_000_000,
        ),
        ("5:cpu,memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "5000000"}, 5_000_000),
        ("5:memory:/job\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        (None, {"memory/memory.limit_in_bytes": "6000000"}, 6_000_000),
        ("nonsense\n", {"memory.max": "nonsense"}, None),
    ],
)
def test_a_control_groups_limit_caps_the_budget(
    registry: ModelVersionManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str | None,
    files: dict[str, str],
    expected: int | None,
):
    from proteus_pipeline.serving import settings

    groups = tmp_path / "groups"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{text}\n")
    if own is not None:
        (tmp_path / "own").write_text(own)
    monkeypatch.setattr(settings, "_CGROUPS", groups)
    monkeypatch.setattr(settings, "_OWN_CGROUP", tmp_path / "own")
    stats = ModelCacheManager(version_manager=registry).get_cache_stats()
    told = (expected, "cgroup") if expected else (4 * 10**9, "max_memory_gb")
    assert (stats["limit_bytes"], stats["limited_by"]) == told


def test_options_that_are_not_the_caches_are_computed_beside_it(
    cache: ModelCacheManager, registry: ModelVersionManager
):
    model = cache.get_or_load("m")
    got = model.embed([PROTEIN], precision="bf16")[0]
    assert np.array_equal(got, ModelInterface("m", registry).embed([PROTEIN], precision="bf16")[0])
    assert cache.get_cache_stats()["loads"] == 1


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_a_slow_source_is_kept_compressed_and_comes_back_bit_for_bit(
    registry: ModelVersionManager, precision: str, monkeypatch: pytest.MonkeyPatch
):
    cache = ModelCacheManager(
        room_for(4),
        version_manager=registry,
        precision=precision,
        tokens_per_batch=TOKENS,
        eviction_policy="ttl",
        ttl=0.4,
    )
    slow = residence.make_encoder

    def slowly(*args: object, **kwargs: object) -> object:
        time.sleep(0.3)
        return slow(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(residence, "make_encoder", slowly)
    model = cache.get_or_load("m")
    before = model.embed([PROTEIN])[0]
    time.sleep(0.4)
    stats = cache.get_cache_stats()
    assert not stats["models"]
    assert 0 < stats["devices"]["cpu"]["compressed_bytes"] == stats["bytes"]
    monkeypatch.setattr(residence, "make_encoder", lambda *_, **__: pytest.fail("the source was read"))
    assert np.array_equal(model.embed([PROTEIN])[0], before)
    stats = cache.get_cache_stats()
    assert (stats["loads"], stats["restored"], stats["devices"]["cpu"]["compressed_bytes"]) == (1, 1, 0)
    cache.clear_cache()
    assert cache.get_cache_stats()["bytes"] == 0


def test_a_fast_source_is_not_compressed_and_neither_is_any_without_compression(registry: ModelVersionManager):
    for compression in (True, False):
        cache = ModelCacheManager(
            room_for(1.5), version_manager=registry, tokens_per_batch=TOKENS, compression=compression
        )
        cache._residence.settings = cache._residence.settings.changed({"compression": compression})
        cache.get_or_load("m@v1.0.0")
        resident = next(iter(cache._residence._residents.values()))
        resident.seconds = 0.0 if compression else 60.0
        del resident
        cache.get_or_load("m@v1.1.0")
        assert not cache.get_cache_stats()["compressed"]


def test_warm_computes_and_preload_does_not(cache: ModelCacheManager):
    (preloaded,) = cache.preload("m")
    assert not preloaded.encoder()._tables
    (warmed,) = cache.warm("lab/n")
    assert warmed.encoder()._tables
    assert cache.get_cache_stats()["loads"] == 2


def test_the_text_for_prometheus_has_the_numbers_of_the_stats(cache: ModelCacheManager):
    cache.get_or_load("m")
    cache.get_cached_model("m")
    families = {family.name: family for family in text_string_to_metric_families(cache.prometheus())}
    found = {(s.name, *sorted(s.labels.items())): s.value for family in families.values() for s in family.samples}
    stats = cache.get_cache_stats()
    device = stats["devices"]["cpu"]

    def value(name: str, **labels: str) -> float:
        return found[f"proteus_cache_{name}", *sorted({"cache": "models", **labels}.items())]

    assert value("requests_total", result="hit") == value("requests_total", result="miss") == 1
    assert value("loads_total", source="weights") == stats["loads"] == 1
    assert value("evictions_total", cause="room") == 0
    assert value("limit_bytes", device="cpu") == device["limit_bytes"] == 4e9
    for kind in ("models", "loading", "calls", "freeing", "compressed"):
        assert value("bytes", device="cpu", kind=kind) == device[f"{kind}_bytes"]
    assert value("load_seconds_count") == 1
    assert value("load_seconds_sum") == pytest.approx(stats["load_seconds"]["p95"])
    assert value("eviction_age_seconds_count") == 0
    assert {family.type for family in families.values()} == {"counter", "gauge", "histogram"}


def test_a_scrape_is_of_the_moment(cache: ModelCacheManager):
    registry = CollectorRegistry()
    registry.register(cache)
    labels = {"cache": "models", "result": "miss"}
    before = registry.get_sample_value("proteus_cache_requests_total", labels)
    cache.get_cached_model("m")
    assert (before, registry.get_sample_value("proteus_cache_requests_total", labels)) == (0, 1)


def test_a_detached_registry_of_no_repository_is_an_empty_one(tmp_path: Path):
    cache = ModelCacheManager(version_manager=ModelVersionManager(tmp_path / "home"))
    assert cache.get_cached_model("m") is None
    with pytest.raises(VersionNotFoundError):
        cache.get_or_load("m")


def test_packed_refs_are_seen(cache: ModelCacheManager, registry: ModelVersionManager, repository: Path):
    cache.get_or_load("m")
    git(repository, "pack-refs", "--all")
    time.sleep(0.15)
    assert cache.get_cached_model("m") is not None
    registry.rollback("m", "1.0.0")
    assert cache.get_cached_model("m") is None


def test_unregistered_weights_that_are_loaded_are_not_read_again_to_compute(
    cache: ModelCacheManager, registry: ModelVersionManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_folder(make_checkpoint(seed=6), tmp_path / "new")
    cache.cache_model(ModelInterface("new", registry, weights=tmp_path / "new"))
    monkeypatch.setattr(reading, "read_checkpoint", lambda _: pytest.fail("the file was read"))
    found = cache.get_cached_model("new")
    assert found is not None
    assert found.embed([PROTEIN])[0].shape == (32,)
