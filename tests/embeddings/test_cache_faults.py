"""What may happen to a cache on a disk: its writers killed, the disk full, bits flipped, files gone."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from entries import HERE, TRUNK, Made, made_by, make, publish, serves
from processes import ends_well, script

from proteus_pipeline.embeddings import index as index_file
from proteus_pipeline.embeddings import visible as visible_file
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.keys import key_strings
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError

TORTURE = os.environ.get("PROTEUS_TORTURE") == "1"
LIVES = 50 if TORTURE else 4  # of each of four writers
FLIPS = 10_000 if TORTURE else 600

# Children are forked, so that a writer is at work as soon as it lives, and killed wherever it then is.
WRITERS = """
import os, random, signal, sys, time
from entries import *
path, slot, lives = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance, began = random.Random(slot), time.perf_counter()
publish(EmbeddingCache(path), made_by(f"{slot}-warm-0"))
one = time.perf_counter() - began
for life in range(lives):
    child = os.fork()
    if child == 0:
        cache = EmbeddingCache(path)
        number = 0
        while True:
            name = f"{slot}-{life}-{number}"
            publish(cache, made_by(name))
            os.write(1, f"{name}\\n".encode())
            number += 1
    time.sleep(chance.uniform(0.01, 0.01 + 10 * one))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
"""

# Told of what was acknowledged, on its standard input, it reads that again and again, through a cache that it opened once.
READER = """
import random, sys, threading
from entries import *
cache, told, over = EmbeddingCache(sys.argv[1]), [], threading.Event()
def listen():
    for line in sys.stdin:
        told.append(line.strip())
    over.set()
threading.Thread(target=listen, daemon=True).start()
chance, reads = random.Random(0), 0
while not over.is_set():
    now = len(told)
    for name in [*told[max(0, now - 4) : now], *chance.sample(told[:now], min(now, 12))]:
        made = made_by(name)
        assert serves(cache, made) == 3, f"{name} was acknowledged, and is a miss"
        key = chance.choice(list(made.arrays))
        assert cache.get(key) is not None, f"{name} was acknowledged, and get misses it"
        reads += 4
    cache.stats()
print(reads)
"""


@pytest.mark.torture
def test_killed_writers_lose_nothing_and_no_reader_notices(tmp_path: Path):
    """Four at a time, killed while they write and while they merge; a reader asks for all that was acknowledged."""
    path = tmp_path / "cache"
    reader = script(READER, path)
    writers = [script(WRITERS, path, slot, LIVES) for slot in range(4)]
    acknowledged: list[str] = []
    lock = threading.Lock()

    def listen(writer: subprocess.Popen[str]) -> None:
        assert writer.stdout is not None and reader.stdin is not None
        for line in writer.stdout:
            with lock:
                acknowledged.append(line.strip())
                if reader.poll() is None:
                    reader.stdin.write(line)
                    reader.stdin.flush()

    threads = [threading.Thread(target=listen, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        assert writer.stderr is not None
        assert (writer.wait(timeout=60), writer.stderr.read()) == (0, "")
    reads = int(ends_well(reader))
    assert len(acknowledged) == len(set(acknowledged)) > LIVES
    assert reads > len(acknowledged)
    cache = EmbeddingCache(path)
    for name in acknowledged:
        assert serves(cache, made_by(name)) == 3, name
    # And all that is visible is sound, acknowledged or not.
    visible = {key for index in cache.visible.indexes for key in key_strings(index.keys())}
    assert len(visible) >= 3 * len(acknowledged)
    assert cache.visible.unreadable == []
    assert len(list(cache.find(visible))) == len(visible)
    assert cache.stats()["entries"] == len(visible)
    assert list((path / "runs").glob("*.run")), "nobody merged"
    print(f"{4 * LIVES} kills, {len(acknowledged)} publications acknowledged, {reads} entries read meanwhile")
    cache.visible.merge(everything=True)
    assert len(list(EmbeddingCache(path).find(visible))) == len(visible)
    assert EmbeddingCache(path).stats()["entries"] == len(visible)


@dataclass
class Victim:
    """A cache with a run of several segments and an index beside it, and what it must give, if it gives anything."""

    path: Path
    made: list[Made] = field(default_factory=list)
    starts: dict[str, bytes] = field(default_factory=dict)

    def fill(self) -> None:
        cache = EmbeddingCache(self.path)
        kinds = [("mean", "fp32"), ("per_residue", "bf16"), ("per_residue", "fp32"), ("max", "fp16"), ("mean", "bf16")]
        for number, (pooling, stored) in enumerate(kinds):
            made = make(12, pooling=pooling, stored=stored, seed=number, prefix=f"{number}-")
            publication = cache.begin(TRUNK, made.recipe)
            for (key, array), length in zip(made.arrays.items(), made.lengths, strict=True):
                start = array[0] * array.dtype.type(3) if pooling == "per_residue" else None
                publication.add(key, array, length, start)
                if start is not None:
                    self.starts[key] = start.tobytes()
            publication.publish(Attestation(HERE, "2.0.0", "2026-01-01T00:00:00+00:00", 3.0, 100))
            self.made.append(made)
            if number == 3:  # the fifth stays an index
                cache.refresh()
                cache.visible.merge()

    @property
    def files(self) -> dict[str, list[Path]]:
        return {folder: sorted((self.path / folder).iterdir()) for folder in ("seg", "index", "runs")}

    @property
    def entries(self) -> int:
        return sum(len(m.arrays) for m in self.made)

    def hits(self, cache: EmbeddingCache) -> int:
        """Return how many entries are hits, having looked at all that a caller can ask for of each."""
        hits = 0
        for made in self.made:
            hits += serves(cache, made)
            if made.recipe.pooling != "per_residue":
                with suppress(StorageError, ConfigError):  # of two kinds, where a segment's number is damaged
                    table = cache.vectors(list(made.arrays))
                    assert table.tobytes() == b"".join(a.tobytes() for a in made.arrays.values())
            for entry, _ in cache.find(made.arrays):
                if len(entry.shape) == 2:  # the length of a pooled one is told to people alone
                    assert entry.length == len(made.arrays[entry.key])
                    with suppress(IntegrityError):
                        start = cache.read_start(entry)
                        assert start is None or start.tobytes() == self.starts[entry.key]
            for key, array in made.arrays.items():
                one = cache.find_one(key)
                assert one is None or one[1].tobytes() == array.tobytes()
        return hits


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    made = Victim(tmp_path / "cache")
    made.fill()
    assert [len(made.files[folder]) for folder in ("seg", "index", "runs")] == [5, 1, 1]
    assert made.hits(EmbeddingCache(made.path)) == made.entries == 60
    return made


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


@pytest.mark.torture
@pytest.mark.parametrize("checked", [True, False], ids=["checked when opened", "too large to be checked"])
def test_no_flipped_bit_is_served(
    victim: Victim, checked: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Segments, an index, and a run: an entry is as it was written or a miss, and nothing else breaks."""
    if not checked:
        monkeypatch.setattr(index_file, "CHECKED_BYTES", 0)
        monkeypatch.setattr(visible_file, "CHECKED_BYTES", 0)
    caplog.set_level(logging.CRITICAL)  # thousands of warnings
    rng = np.random.default_rng(int(checked))
    targets = [*victim.files["runs"], *victim.files["index"], *victim.files["seg"]] if checked else victim.files["runs"]
    sizes = {path: path.stat().st_size for path in targets}
    missed = harmless = 0
    for number in range(FLIPS // 2):
        path = targets[number % len(targets)]
        at, bit = int(rng.integers(sizes[path])), 1 << int(rng.integers(8))
        flip(path, at, bit)
        cache = EmbeddingCache(victim.path)
        hits = victim.hits(cache)
        cache.stats()
        missed += hits < victim.entries
        harmless += hits == victim.entries
        if checked and path.parent.name != "seg":
            beneath = 48 if path.parent.name == "runs" else 12
            assert hits == (victim.entries if at in range(12, 16) else victim.entries - beneath), (path, at)
        flip(path, at, bit)
    assert victim.hits(EmbeddingCache(victim.path)) == victim.entries
    assert missed > FLIPS // 8
    print(f"{FLIPS // 2} flips: {missed} made misses, {harmless} nothing")


def test_a_damaged_run_is_never_merged_into_one_with_a_sound_checksum(victim: Victim, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_file, "CHECKED_BYTES", 0)
    monkeypatch.setattr(visible_file, "CHECKED_BYTES", 0)
    (run,) = victim.files["runs"]
    size = run.stat().st_size
    for at in (56, 48, 52, 28, 8):  # in the last record, from its end: low, offset, nbytes, row, segment
        flip(run, size - at, 1)
        cache = EmbeddingCache(victim.path)
        cache.refresh()
        cache.visible.merge(everything=True)
        assert run in victim.files["runs"]
        assert victim.hits(EmbeddingCache(victim.path)) >= victim.entries - 1
        flip(run, size - at, 1)
    assert victim.hits(EmbeddingCache(victim.path)) == victim.entries


def without(segment: Path, gone: str) -> None:
    """Write a segment again as it is, with its directory in order, but for one member."""
    rest = segment.with_suffix(".new")
    with zipfile.ZipFile(segment) as old, zipfile.ZipFile(rest, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            if info.filename != gone:
                new.writestr(zipfile.ZipInfo(info.filename, info.date_time), old.read(info))
    rest.rename(segment)


def test_a_deleted_chunk_is_a_miss_and_never_zeros(victim: Victim, caplog: pytest.LogCaptureFixture):
    """zarr reads a chunk that is not there as zeros."""
    for segment in victim.files["seg"]:
        whole = segment.read_bytes()
        with zipfile.ZipFile(segment) as file:
            chunks = [n for n in file.namelist() if "/c/" in n]
        for chunk in chunks:
            without(segment, chunk)
            hits = victim.hits(EmbeddingCache(victim.path))
            entries = chunk.startswith("pooled/") or len(chunk.split("/")[0]) == 32
            assert hits < victim.entries if entries else hits >= victim.entries - 12, chunk
            segment.write_bytes(whole)
    assert victim.hits(EmbeddingCache(victim.path)) == victim.entries
    assert "is not what its index says" in caplog.text


@pytest.mark.parametrize(("folder", "gone"), [("seg", 12), ("index", 12), ("runs", 48)])
def test_a_deleted_or_truncated_file_takes_its_entries_and_no_others(
    victim: Victim, folder: str, gone: int, caplog: pytest.LogCaptureFixture
):
    opened = EmbeddingCache(victim.path)
    opened.refresh()  # and reads of a segment that it opened go on, as they do of any file
    for path in victim.files[folder]:
        whole = path.read_bytes()
        path.unlink()
        assert victim.hits(EmbeddingCache(victim.path)) == victim.entries - gone
        if folder != "seg":
            assert victim.hits(opened) == victim.entries - gone
        for size in range(0, len(whole), 997):
            path.write_bytes(whole[:size])
            hits = victim.hits(EmbeddingCache(victim.path))
            # A segment may have lost its directory alone, and an entry is read without it.
            assert victim.entries - gone <= hits <= victim.entries - gone * (folder != "seg")
        path.write_bytes(whole)
    assert victim.hits(EmbeddingCache(victim.path)) == victim.entries


@pytest.mark.parametrize("folder", ["seg", "index", "runs"])
def test_what_is_gone_is_there_again_when_it_is_published_again(victim: Victim, folder: str):
    for path in victim.files[folder]:
        path.unlink()
    cache = EmbeddingCache(victim.path)
    assert victim.hits(cache) < victim.entries
    for made in victim.made:
        publish(cache, made)
    assert sum(serves(EmbeddingCache(victim.path), made) for made in victim.made) == victim.entries


# What is left free grows by a page at a time, so that the disk is full in the segment, in its index, and while merging.
FULL = """
import errno, logging, os, sys
from pathlib import Path
from entries import *
from proteus_pipeline.errors import StorageError
path, pooling = Path(sys.argv[1]) / "cache", sys.argv[2]
kept = [make(4, prefix=f"kept{n}") for n in range(2)] + [make(4, pooling="per_residue", prefix="residues")]
for made in kept:
    publish(EmbeddingCache(path), made)
def names():
    return sorted(p.name for p in path.rglob("*") if p.is_file())
logging.disable()
ballast, page = path.parent / "ballast", 4096
with ballast.open("wb") as file:
    try:
        while True:
            os.write(file.fileno(), bytes(page))
    except OSError as error:
        assert error.errno == errno.ENOSPC
full = ballast.stat().st_size
failed = []
for number in range(200):
    before, made = names(), make(40, pooling=pooling, width=200, prefix=f"more{number}-")
    cache = EmbeddingCache(path)
    try:
        publish(cache, made)
        kept.append(made)
        break
    except StorageError as error:
        failed.append(str(error))
    assert names() == before, (before, names())
    assert serves(cache, made) == serves(EmbeddingCache(path), made) == 0
    assert [serves(EmbeddingCache(path), made) for made in kept] == [4, 4, 4]
    os.truncate(ballast, full - page * (number + 1))
assert {serves(EmbeddingCache(path), made) for made in kept} == {4, 40}
ballast.unlink()
EmbeddingCache(path).tidy()
assert {serves(EmbeddingCache(path), made) for made in kept} == {4, 40}
assert EmbeddingCache(path).stats()["entries"] == 52
for line in failed:
    print(line)
"""


def full_disks() -> list[tuple[str, ...]]:
    """Return the commands, of those that work here, that mount a small tmpfs which nobody else sees."""
    ways = [("unshare", "--mount"), ("unshare", "--mount", "--map-root-user")]
    works = []
    for way in ways:
        probe = [*way, "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /tmp"]
        with suppress(OSError):
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                works.append(way)
    return works


@pytest.mark.parametrize("pooling", ["mean", "per_residue"])
def test_a_disk_that_is_full_in_mid_write_leaves_the_old_state_whole(tmp_path: Path, pooling: str):
    ways = full_disks()
    if not ways:  # nobody may mount here: test_cache.py's limit on a file's size takes the same path, with EFBIG
        return
    mounts = (*ways[0], "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', str(tmp_path))
    said = ends_well(script(FULL, tmp_path, pooling, through=mounts)).splitlines()
    assert len(said) > 5
    for line in said:
        assert line.endswith("no space left on device; free space there, or choose another location")
    assert any(f"cannot write {tmp_path}/cache/seg/" in line for line in said)
    assert any(f"cannot write {tmp_path}/cache/index/" in line for line in said)
