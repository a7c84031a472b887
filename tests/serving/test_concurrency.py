"""Threads, interrupts and errors at the worst moments: nothing hangs, leaks, is overtaken for ever, or is another model's."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from layouts import write_official

from proteus_pipeline import CacheMemoryError, IntegrityError, ModelCacheManager, ModelInterface, ModelVersionManager
from proteus_pipeline.models import reading
from proteus_pipeline.models.blocks import Block
from proteus_pipeline.models.encoder import activation_bytes, weight_bytes
from proteus_pipeline.models.esm2 import Esm2Encoder
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.models.workers import thread_count
from proteus_pipeline.serving import holdings, residence

PROTEIN, TOKENS = "MKTAYIAKQR", 64
Register = Callable[..., ModelVersionManager]


@pytest.fixture
def register(repository: Path, tmp_path: Path) -> Register:
    """Register two versions of m and one of lab/n, of a shape that may be given."""

    def make(**shape: int) -> ModelVersionManager:
        manager = ModelVersionManager(repository)
        for name, version, seed in (("m", "1.0.0", 0), ("m", "1.1.0", 1), ("lab/n", "1.0.0", 2)):
            write_folder(make_checkpoint(seed=seed, **shape), tmp_path / f"{seed}")
            manager.register_version(ModelInterface(name, manager, weights=tmp_path / f"{seed}"), version)
        return manager

    return make


def sizes(residues: int, **shape: int) -> tuple[int, int, int]:
    """Return the bytes of a model, of a usual call, and of a call with one protein."""
    architecture, threads = make_checkpoint(**shape).architecture, thread_count()
    usual = activation_bytes(architecture, [TOKENS - 2] * (threads + 1), tokens=TOKENS, threads=threads)
    call = activation_bytes(architecture, [residues], tokens=TOKENS, threads=threads)
    return weight_bytes(architecture, "fp32"), usual, call


def test_request_threads_that_load_and_compute_leave_torch_its_threads(register: Register):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        shape = {"layers": 2, "width": 128, "heads": 4}
        manager = register(**shape)
        weights, usual, _ = sizes(1, **shape)
        cache = ModelCacheManager(
            (2.2 * weights + usual) / 1e9, version_manager=manager, tokens_per_batch=TOKENS, compression=False
        )
        names = ["m@v1.0.0", "m@v1.1.0", "lab/n"]
        for _ in range(30):  # each a new thread, as a server has for each request
            threads = [threading.Thread(target=lambda n=n: cache.get_or_load(n).embed([PROTEIN] * 3)) for n in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
        assert thread_count() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def catalogue(repository: Path) -> ModelVersionManager:
    """A project whose conf/model has two versions of `mine`, neither of them registered."""
    sources = [f'  "{v}": {{source: {{kind: file, path: w/{v}.pt}}}}' for v in ("1.0.0", "2.0.0")]
    (repository / "conf/model").mkdir(parents=True)
    (repository / "w").mkdir()
    text = "\n".join(["name: mine", "description: d", "licence: MIT", "versions:", *sources, ""])
    (repository / "conf/model/mine.yaml").write_text(text)
    for seed, version in enumerate(("1.0.0", "2.0.0")):
        write_official(make_checkpoint(seed=seed), repository / "w" / f"{version}.pt", contact=False)
    return ModelVersionManager(repository)


def test_a_catalogues_versions_are_told_apart(catalogue: ModelVersionManager):
    cache = ModelCacheManager(version_manager=catalogue)
    exact = {v: ModelInterface(f"mine@v{v}", catalogue).embed([PROTEIN])[0] for v in ("1.0.0", "2.0.0")}
    for reference, version in (("mine", "2.0.0"), ("mine@v1.0.0", "1.0.0"), ("mine", "2.0.0"), ("mine@1.x", "1.0.0")):
        model = cache.get_or_load(reference)
        found = cache.get_cached_model(reference)
        assert found is not None
        assert model.reference == found.reference == f"mine@v{version}"
        assert np.array_equal(found.embed([PROTEIN])[0], exact[version])
    assert cache.get_cached_model("mine@latest") is not None
    assert cache.get_cache_stats()["loads"] == 2
    assert cache.invalidate("mine") == 2


def test_a_catalogues_model_is_read_for_one_of_those_who_ask(
    catalogue: ModelVersionManager, monkeypatch: pytest.MonkeyPatch
):
    read, real = list[Path](), reading.read_checkpoint

    def slowly(path: Path) -> object:
        read.append(path)
        time.sleep(0.1)
        return real(path)

    monkeypatch.setattr(reading, "read_checkpoint", slowly)
    cache = ModelCacheManager(version_manager=catalogue)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(cache.get_or_load, ["mine"] * 16))
    assert len(read) == 2  # once for the digest, once to load
    cache.get_or_load("mine@latest")
    assert (len(read), cache.get_cache_stats()["loads"]) == (2, 1)


def test_a_file_that_was_changed_is_not_served_as_what_it_was(register: Register, tmp_path: Path):
    manager = register()
    cache = ModelCacheManager(version_manager=manager, compression=False)
    for seed, name in ((0, "work.pt"), (7, "other.pt")):
        write_official(make_checkpoint(seed=seed), tmp_path / name, lm=False, contact=False)
    cache.cache_model(ModelInterface("work", manager, weights=tmp_path / "work.pt"))
    cache.clear_cache()
    (tmp_path / "other.pt").replace(tmp_path / "work.pt")
    with pytest.raises(IntegrityError, match=r"work\.pt is no longer what was cached as work; cache the model again"):
        cache.get_or_load("work")
    new = cache.cache_model(ModelInterface("work", manager, weights=tmp_path / "work.pt"))
    assert np.array_equal(
        new.embed([PROTEIN])[0], ModelInterface("x", weights=tmp_path / "work.pt").embed([PROTEIN])[0]
    )


@pytest.fixture
def shard(register: Register) -> tuple[ModelVersionManager, Path]:
    """A registry, and the file in DVC's cache of a block of m@v1.0.0."""
    manager = register()
    return manager, manager.get_version("m", "1.0.0").files["model-layer-0.safetensors"].resolve()


def write_into(path: Path, data: bytes, at: int = 0) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        file.write(data)
    path.chmod(0o444)


def test_a_version_whose_file_is_written_to_is_let_go_and_checked_anew(shard: tuple[ModelVersionManager, Path]):
    manager, path = shard
    cache = ModelCacheManager(version_manager=manager)
    model, (before,) = cache.get_or_load("m@v1.0.0"), cache.get_or_load("m@v1.0.0").embed([PROTEIN])
    other = cache.get_or_load("lab/n")
    encoder, whole = model.encoder(), path.read_bytes()
    write_into(path, b"\1" * 8)
    with pytest.raises(IntegrityError, match=r"was changed while it was in use \(model-layer-0.safetensors\)"):
        list(encoder.encode([PROTEIN], [1]))
    assert cache.get_cached_model("m@v1.0.0") is None
    with pytest.raises(IntegrityError, match="is damaged"):
        model.embed([PROTEIN])
    write_into(path, whole)
    time.sleep(1)  # until a failed load may be tried again
    assert np.array_equal(model.embed([PROTEIN])[0], before)
    assert len(list(model.encoder().encode([PROTEIN], [1]))) == 1
    assert len(other.embed([PROTEIN])) == 1
    stats = cache.get_cache_stats()
    assert (stats["loads"], stats["evictions"]["invalidated"]) == (3, 1)
    del encoder
    cache.get_cache_stats()
    assert cache.get_cache_stats()["devices"]["cpu"]["freeing_bytes"] == 0


def test_a_version_that_was_damaged_and_mended_while_it_was_loaded_gives_its_own_numbers(
    shard: tuple[ModelVersionManager, Path],
):
    manager, path = shard
    cache = ModelCacheManager(version_manager=manager)
    model, whole = cache.get_or_load("m@v1.0.0"), path.read_bytes()
    (before,) = model.embed([PROTEIN])
    write_into(path, b"\1\2\3\4", at=-4)
    path.rename(path.with_name("quarantined"))  # as a repair does
    path.write_bytes(whole)
    assert np.array_equal(model.embed([PROTEIN])[0], before)
    assert cache.get_cache_stats()["evictions"]["invalidated"] == 1


def test_a_version_that_is_written_to_while_it_computes_is_let_go(
    shard: tuple[ModelVersionManager, Path], monkeypatch: pytest.MonkeyPatch
):
    manager, path = shard
    cache = ModelCacheManager(version_manager=manager)
    model, real = cache.get_or_load("m@v1.0.0"), Esm2Encoder._forward

    def written_to(*args: object) -> object:
        write_into(path, b"\1\2\3\4", at=-4)
        return real(*args)

    monkeypatch.setattr(Esm2Encoder, "_forward", written_to)
    with pytest.raises(IntegrityError, match="was changed while it was in use"):
        model.embed([PROTEIN])
    stats = cache.get_cache_stats()
    assert (stats["models"], stats["evictions"]["invalidated"]) == ({}, 1)


def test_no_copy_is_kept_of_what_was_written_to(
    shard: tuple[ModelVersionManager, Path], monkeypatch: pytest.MonkeyPatch
):
    manager, path = shard
    monkeypatch.setattr(holdings, "_WORTH", 1e9)
    monkeypatch.setattr(holdings, "_FASTEST_UNPACKING", 1e15)
    for written in (False, True):
        cache = ModelCacheManager(version_manager=manager, eviction_policy="ttl", ttl=0.2)
        cache.get_or_load("m@v1.0.0")
        if written:
            write_into(path, b"\1\2\3\4", at=-4)
        time.sleep(0.2)
        stats = cache.get_cache_stats()
        assert (len(stats["models"]), len(stats["compressed"])) == (0, 0 if written else 1)


def test_files_of_fair_esm_are_read_by_many_threads(tmp_path: Path):
    path = write_official(make_checkpoint(), tmp_path / "x.pt")
    with ThreadPoolExecutor(4) as pool:
        digests = {c.model_digest for c in pool.map(lambda _: reading.read_checkpoint(path), range(100))}
    assert len(digests) == 1


def test_a_failed_load_holds_nothing_and_its_error_does_not_grow(register: Register, monkeypatch: pytest.MonkeyPatch):
    begun, built = itertools.count(), []  # a count, since blocks are made by all threads at once

    def failing(*args: object) -> Block:
        if next(begun) >= 3:
            raise OSError(5, "the disk is away")
        block = Block(*args)  # type: ignore[arg-type]
        built.append(weakref.ref(block))
        return block

    monkeypatch.setattr("proteus_pipeline.models.esm2.Block", failing)
    cache = ModelCacheManager(version_manager=register(layers=4))
    depths = []
    for _ in range(5):
        with pytest.raises(OSError, match="the disk is away") as caught:
            cache.get_or_load("m")
        depths.append(len(caught.traceback))
        del caught
    gc.collect()
    assert [block() for block in built] == [None] * 3  # these, not all of the process: other tests' models may live on
    assert len(set(depths[1:])) == 1


def test_ctrl_c_while_a_load_is_entered_leaves_nothing_and_nobody_waiting(
    register: Register, monkeypatch: pytest.MonkeyPatch
):
    cache, real, held = ModelCacheManager(version_manager=register()), residence.make_encoder, threading.Event()

    def busy_books() -> None:
        with cache._residence._changed:
            held.set()
            time.sleep(0.5)

    def loaded(*args: object, **kwargs: object) -> object:
        encoder = real(*args, **kwargs)  # type: ignore[arg-type]
        threading.Thread(target=busy_books).start()
        held.wait()
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        return encoder

    monkeypatch.setattr(residence, "make_encoder", loaded)
    with pytest.raises(KeyboardInterrupt):
        cache.get_or_load("m")
    monkeypatch.undo()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cache.get_or_load, "m").result(timeout=20).reference == "m@v1.1.0"
    stats = cache.get_cache_stats()
    assert (stats["leases"], stats["devices"]["cpu"]["loading_bytes"]) == (0, 0)


def test_who_stops_waiting_for_a_load_leaves_no_lease(register: Register, monkeypatch: pytest.MonkeyPatch):
    cache, real = ModelCacheManager(version_manager=register()), residence.make_encoder

    def slowly(*args: object, **kwargs: object) -> object:
        time.sleep(0.8)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    def late(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(residence, "make_encoder", slowly)
    before = signal.signal(signal.SIGALRM, late)
    try:
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(cache.get_or_load, "m")
            time.sleep(0.2)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(TimeoutError):
                cache.get_or_load("m")
            loading.result()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert cache.get_cache_stats()["leases"] == 0


def test_a_copy_without_room_beside_its_model_gives_way_to_the_source(register: Register):
    shape = {"layers": 4, "width": 128, "heads": 4}
    manager = register(**shape)
    weights, usual, _ = sizes(1, **shape)
    cache = ModelCacheManager(
        version_manager=manager, tokens_per_batch=TOKENS, patience=1, eviction_policy="ttl", ttl=0.05
    )
    cache.get_or_load("m@v1.0.0")
    next(iter(cache._residence._residents.values())).seconds = 60.0
    time.sleep(0.06)
    assert cache.get_cache_stats()["compressed"]
    cache.update_cache_config({"eviction_policy": "lru"})
    with cache.lease("m@v1.1.0"):
        cache.update_cache_config({"max_memory_gb": (2.5 * weights + usual) / 1e9})
        cache.get_or_load("m@v1.0.0")
    stats = cache.get_cache_stats()
    assert (stats["loads"], stats["restored"], stats["compressed"]) == (3, 0, {})


def test_what_a_long_protein_made_an_encoder_grow_by_is_counted(register: Register):
    cache = ModelCacheManager(version_manager=register(), tokens_per_batch=TOKENS)
    model = cache.get_or_load("m")
    before = cache.get_cache_stats()["bytes"]
    model.embed([PROTEIN * 500])
    stats = cache.get_cache_stats()
    assert stats["bytes"] > before
    assert list(stats["models"].values()) == [model.encoder().nbytes]


def test_nothing_computes_on_once_a_call_has_failed(register: Register, monkeypatch: pytest.MonkeyPatch):
    model = ModelCacheManager(version_manager=register()).get_or_load("m")
    monkeypatch.setattr(Esm2Encoder, "_results", lambda *_: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError, match="no") as kept:
        model.embed([PROTEIN * 20] * 40)
    assert kept.value.__traceback__ is not None
    assert not [t for t in threading.enumerate() if t.name.startswith("encoder")]


def test_two_large_calls_that_need_each_others_room_take_turns(register: Register):
    shape = {"layers": 2, "width": 128, "heads": 4}
    manager = register(**shape)
    weights, _, call = sizes(3000, **shape)
    cache = ModelCacheManager(
        (1.5 * weights + call) / 1e9, version_manager=manager, tokens_per_batch=TOKENS, patience=20, compression=False
    )
    gate = threading.Barrier(2)

    def ask(name: str) -> bytes:
        model = cache.get_or_load(name)
        gate.wait()
        return model.embed(["A" * 3000])[0].tobytes()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, ["m@v1.0.0", "lab/n"])
    assert first == ModelInterface("m@v1.0.0", manager).embed(["A" * 3000])[0].tobytes() != second


def test_a_large_call_is_not_overtaken_for_ever(register: Register):
    shape = {"layers": 2, "width": 128, "heads": 4}
    manager = register(**shape)
    weights, _, call = sizes(3000, **shape)
    cache = ModelCacheManager(
        (weights + call) * 1.01 / 1e9, version_manager=manager, tokens_per_batch=TOKENS, patience=10, compression=False
    )
    model, stop = cache.get_or_load("m"), threading.Event()

    def small() -> Iterator[None]:
        while not stop.is_set():
            model.embed(["A" * 200])
            yield

    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(lambda: sum(1 for _ in small())) for _ in range(4)]
        time.sleep(0.2)
        try:
            model.embed(["A" * 3000])
        finally:
            stop.set()
        assert all(other.result() for other in others)


def test_a_load_that_was_invalidated_under_way_is_served_to_nobody_else(
    register: Register, monkeypatch: pytest.MonkeyPatch
):
    cache, real, begun = ModelCacheManager(version_manager=register()), residence.make_encoder, threading.Event()

    def slowly(*args: object, **kwargs: object) -> object:
        begun.set()
        time.sleep(0.4)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(residence, "make_encoder", slowly)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(cache.get_or_load, "m")
        begun.wait()
        assert cache.invalidate("m") == 0
        loading.result()
    assert cache.get_cached_model("m") is None
    assert cache.get_cache_stats()["evictions"]["invalidated"] == 1


def test_a_copy_in_the_making_is_dropped_by_what_drops_copies(register: Register, monkeypatch: pytest.MonkeyPatch):
    begun, real = threading.Event(), holdings.Packed

    def slowly(*args: object) -> object:
        begun.set()
        time.sleep(0.4)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(holdings, "Packed", slowly)
    for drop in ("clear_cache", "update_cache_config"):
        begun.clear()
        cache = ModelCacheManager(version_manager=register(), eviction_policy="ttl", ttl=0.1)
        cache.get_or_load("m")
        next(iter(cache._residence._residents.values())).seconds = 60.0
        time.sleep(0.1)
        with ThreadPoolExecutor(1) as pool:
            packing = pool.submit(cache.get_cache_stats)
            begun.wait()
            getattr(cache, drop)(*([] if drop == "clear_cache" else [{"compression": False}]))
            packing.result()
        assert not cache.get_cache_stats()["compressed"]


def test_changes_of_two_settings_at_once_both_hold(register: Register):
    cache = ModelCacheManager(version_manager=register())
    for number in range(1, 40):
        changes = [{"max_memory_gb": number / 10}, {"patience": float(number)}]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(cache.update_cache_config, changes))
        settings = cache._residence.settings
        assert (settings.max_memory_gb, settings.patience) == (number / 10, number)


def test_invalidate_takes_what_a_reference_means_and_deleted_versions_too(register: Register):
    manager = register()
    cache = ModelCacheManager(version_manager=manager)
    cache.preload("m@v1.0.0", "m@v1.1.0")
    assert cache.invalidate("m@1.0.x") == 1
    assert cache.get_cached_model("m@v1.1.0") is not None
    cache.get_or_load("m@v1.0.0")
    manager.delete_version("m", "1.0.0")
    assert cache.invalidate("m@v1.0.0") == 1
    assert cache.invalidate("m") == 1


def test_another_precision_is_computed_in_room_of_its_own_or_refused(register: Register):
    manager = register(layers=4, width=128, heads=4)
    weights, usual, _ = sizes(1, layers=4, width=128, heads=4)
    cache = ModelCacheManager(
        (1.1 * weights + usual) / 1e9, version_manager=manager, tokens_per_batch=TOKENS, patience=0.1
    )
    model = cache.get_or_load("m")
    with (
        cache.lease("m"),
        pytest.raises(CacheMemoryError, match=r"a call of m@v1\.1\.0 in bf16, which is not the cache's, takes"),
    ):
        model.embed([PROTEIN * 200], precision="bf16")
    cache.update_cache_config({"max_memory_gb": 1})
    got = model.embed([PROTEIN], precision="bf16")[0]
    assert np.array_equal(got, ModelInterface("m", manager).embed([PROTEIN], precision="bf16")[0])
    with pytest.raises(TypeError):
        model.embed([PROTEIN], nonsense=None)  # type: ignore[arg-type]
