from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from entries import HERE, THERE, TRUNK, Made, headers, make, publish, serves
from processes import ends_well, script

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.keys import key_strings
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError

KILLS = 200 if os.environ.get("PROTEUS_TORTURE") == "1" else 15


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def newest(folder: Path) -> Path:
    return max(folder.iterdir())


def damage(path: Path) -> None:
    """Overwrite a segment's members, all but its first and last bytes."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(40)
        file.write(b"\x5a" * (size - 80))


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this user may read and not write: root becomes nobody until the test is over."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders let nobody else in
    was = os.geteuid()
    try:
        yield folder
    finally:
        os.seteuid(was)
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


def close(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("pooling", ["mean", "per_residue"])
@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
def test_what_one_instance_publishes_another_reads(tmp_path: Path, pooling: str, stored: str):
    made = make(40, pooling=pooling, stored=stored)
    reader = EmbeddingCache(tmp_path / "cache")
    assert serves(reader, made) == 0
    publish(EmbeddingCache(tmp_path / "cache"), made)
    assert serves(reader, made) == 40  # open before, and sees it
    assert serves(EmbeddingCache(tmp_path / "cache"), made) == 40
    assert names(tmp_path) == ["cache"]
    for key in made.arrays:
        array = reader.get(key)
        assert array is not None
        assert array.dtype == np.float32
        array += 1  # the reader's own
    assert serves(reader, made) == 40


def test_a_segment_says_by_itself_where_its_entries_come_from(tmp_path: Path):
    import zarr

    made = make(3)
    publish(EmbeddingCache(tmp_path), made, THERE, seconds=1.5, tokens=70)
    group = zarr.open_group(zarr.storage.ZipStore(newest(tmp_path / "seg"), mode="r"), mode="r")
    said = group.attrs.asdict()["proteus"]
    assert isinstance(said, dict)
    assert said["trunk"] == TRUNK
    (header,) = headers(tmp_path)
    assert said["attestation"] == dataclasses.asdict(header.attestation)
    assert Attestation(**said["attestation"]) == Attestation(THERE, "2.0.0", "2026-01-01T00:00:00+00:00", 1.5, 70)


def test_keys_that_are_not_there_are_misses_among_those_that_are(tmp_path: Path):
    made, other = make(5), make(5, prefix="other")
    cache = EmbeddingCache(tmp_path)
    publish(cache, made)
    mixed = [k for pair in zip(other.arrays, made.arrays, strict=True) for k in pair]
    assert {e.key for e, _ in cache.find([*mixed, *mixed])} == set(made.arrays)
    assert len(list(cache.find([*mixed, *mixed]))) == 5
    assert cache.get(mixed[0]) is None
    assert list(cache.find([])) == []


def test_segments_of_other_processes_appear(tmp_path: Path):
    cache = EmbeddingCache(tmp_path)
    publish(cache, make(3, prefix="mine"))
    assert cache.stats()["segments"] == 1
    code = "import sys; from entries import *; publish(EmbeddingCache(sys.argv[1]), make(4, prefix='theirs'))"
    ends_well(script(code, tmp_path))
    assert serves(cache, make(4, prefix="theirs")) == 4
    assert cache.stats()["entries"] == 7


def test_an_unknown_accept_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cache\.accept is 'mine'; use one of any, same_class"):
        EmbeddingCache(tmp_path, accept="mine")


def two_classes(path: Path) -> tuple[Made, Made]:
    here, there = make(3, seed=1), make(3, seed=2)
    assert list(here.arrays) == list(there.arrays)
    publish(EmbeddingCache(path), here, HERE)
    publish(EmbeddingCache(path), there, THERE)
    return here, there


def test_the_own_class_is_preferred_then_the_newest(tmp_path: Path):
    here, there = two_classes(tmp_path)
    keys = list(here.arrays)
    for mine, expected in ((HERE, here), (THERE, there), ("cpu/arm64", there)):
        cache = EmbeddingCache(tmp_path, device_class=lambda mine=mine: mine)
        assert serves(cache, expected) == 3
        assert [len(c) for c in cache.candidates(keys).values()] == [2, 2, 2]
    again = make(3, seed=3)
    publish(EmbeddingCache(tmp_path), again, HERE)
    assert serves(EmbeddingCache(tmp_path, device_class=lambda: HERE), again) == 3
    assert serves(EmbeddingCache(tmp_path, device_class=lambda: THERE), there) == 3


def test_same_class_refuses_the_others(tmp_path: Path):
    here, there = two_classes(tmp_path)
    publish(EmbeddingCache(tmp_path), make(2, prefix="only there"), THERE)
    cache = EmbeddingCache(tmp_path, accept="same_class", device_class=lambda: HERE)
    assert serves(cache, here) == 3
    assert {e.device_class for c in cache.candidates(list(here.arrays)).values() for e in c} == {HERE}
    assert serves(cache, make(2, prefix="only there")) == 0
    nobody = EmbeddingCache(tmp_path, accept="same_class", device_class=lambda: "cpu/arm64")
    assert nobody.candidates(list(there.arrays)) == {}


def test_this_machines_class_is_not_asked_for_without_need(tmp_path: Path):
    def never() -> str:
        raise AssertionError("it imports torch")

    made = make(3)
    publish(EmbeddingCache(tmp_path), made, THERE)
    assert serves(EmbeddingCache(tmp_path, device_class=never), made) == 3


def test_entries_of_one_key_with_other_numbers_are_told_apart(tmp_path: Path):
    here, there = two_classes(tmp_path)
    cache = EmbeddingCache(tmp_path, device_class=lambda: HERE)
    for key, entries in cache.candidates(list(here.arrays)).items():
        first, second = entries
        assert first.content != second.content
        assert cache.read(first).tobytes() == here.arrays[key].tobytes()
        assert cache.read(second).tobytes() == there.arrays[key].tobytes()


def test_a_damaged_entry_gives_way_to_an_older_sound_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    made = make(5)
    publish(EmbeddingCache(tmp_path), made)
    publish(EmbeddingCache(tmp_path), made)
    damage(newest(tmp_path / "seg"))
    cache = EmbeddingCache(tmp_path)
    assert serves(cache, made) == 5
    assert len(caplog.messages) == 5
    assert "is not what its index says" in caplog.messages[0]
    with pytest.raises(IntegrityError, match=newest(tmp_path / "seg").name):
        cache.read(cache.candidates(list(made.arrays))[next(iter(made.arrays))][0])


def test_a_deleted_segment_is_a_miss(tmp_path: Path):
    made = make(5)
    cache = EmbeddingCache(tmp_path)
    publish(cache, made)
    (entry,) = cache.candidates([next(iter(made.arrays))]).popitem()[1]
    newest(tmp_path / "seg").unlink()
    for opened in (cache, EmbeddingCache(tmp_path)):
        assert serves(opened, made) == 0
        assert opened.get(entry.key) is None
    with pytest.raises(StorageError, match=r"zip is gone; run: proteus cache verify"):
        cache.read(entry)
    publish(cache, made)
    assert serves(cache, made) == 5


def test_a_deleted_index_takes_its_entries_along(tmp_path: Path):
    made, kept = make(5), make(2, prefix="kept")
    cache = EmbeddingCache(tmp_path)
    publish(cache, kept)
    publish(cache, made)
    assert serves(cache, made) == 5
    newest(tmp_path / "index").unlink()
    for opened in (cache, EmbeddingCache(tmp_path)):
        assert serves(opened, made) == 0
        assert serves(opened, kept) == 2
        assert opened.stats()["segments"] == 1


def test_a_segment_without_index_is_invisible(tmp_path: Path):
    made = make(5)
    publish(EmbeddingCache(tmp_path), made)
    shutil.rmtree(tmp_path / "index")
    assert serves(EmbeddingCache(tmp_path), made) == 0
    assert EmbeddingCache(tmp_path).stats()["entries"] == 0


def test_a_file_in_the_folders_place_is_named(tmp_path: Path):
    (tmp_path / "cache").write_text("")
    cache = EmbeddingCache(tmp_path / "cache")
    for attempt in (lambda: cache.get("0" * 32), lambda: publish(cache, make(1))):
        with pytest.raises(StorageError, match=str(tmp_path / "cache")):
            attempt()


def test_stats_count_what_is_there(tmp_path: Path):
    cache = EmbeddingCache(tmp_path)
    empty = {"entries": 0, "segments": 0, "bytes": 0, "raw_bytes": 0, "hits": 0, "derived": 0, "misses": 0}
    nothing = {"redis_hits": 0, "redis_rejected": 0}
    assert cache.stats() == empty | nothing
    pooled, residues = make(20, stored="fp16"), make(3, pooling="per_residue", prefix="r")
    publish(cache, pooled)
    publish(cache, residues)
    cache.record_use(hits=1, derived=2, misses=3)
    EmbeddingCache(tmp_path).record_use(hits=10, derived=20, misses=30)
    with (tmp_path / "uses.jsonl").open("ab") as file:
        file.write(b'["not", "ours"]\n{"hits": 10')  # and a line cut short
    stored = sum(a.nbytes for made in (pooled, residues) for a in made.arrays.values())
    on_disk = sum(p.stat().st_size for p in tmp_path.glob("*/*"))
    expected = {"entries": 23, "segments": 2, "bytes": on_disk, "raw_bytes": stored}
    assert cache.stats() == expected | {"hits": 11, "derived": 22, "misses": 33} | nothing


def test_no_use_is_lost_between_processes(tmp_path: Path):
    code = (
        "import sys; from proteus_pipeline.embeddings.cache import EmbeddingCache\n"
        "cache = EmbeddingCache(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
        "for n in range(50): cache.record_use(1, n, 100)"
    )
    processes = [script(code, tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all at once
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        ends_well(process)
    stats = EmbeddingCache(tmp_path).stats()
    assert (stats["hits"], stats["derived"], stats["misses"]) == (200, 4 * sum(range(50)), 20_000)
    assert all(json.loads(line) for line in (tmp_path / "uses.jsonl").read_text().splitlines() if line)


def test_entries_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path):
    cache = EmbeddingCache(tmp_path / "cache")
    attestation = Attestation(HERE, "2.0.0", "2026-01-01T00:00:00+00:00", 1.0, 10)
    pooled, residues = make(3), make(3, pooling="per_residue")
    keys, rows = list(pooled.arrays), list(pooled.arrays.values())
    blocks = list(residues.arrays.values())
    longer = [n + 1 for n in residues.lengths]
    for recipe, names_, arrays, lengths, said in [
        (pooled.recipe, [], [], [], "make no segment"),
        (pooled.recipe, keys, rows[:2], pooled.lengths, "make no segment"),
        (pooled.recipe, keys, rows, pooled.lengths[:2], "make no segment"),
        (pooled.recipe, keys[:1] * 3, rows, pooled.lengths, "each key once"),
        (pooled.recipe, keys, [r.astype("<f2") for r in rows], pooled.lengths, "in fp32"),
        (pooled.recipe, keys, [*rows[:2], rows[2][:4]], pooled.lengths, r"float32 \(4,\) is no mean array"),
        (pooled.recipe, keys, blocks, residues.lengths, "is no mean array"),
        (residues.recipe, keys, rows, pooled.lengths, "is no per_residue array"),
        (residues.recipe, keys, blocks, longer, "is no per_residue array"),
        (residues.recipe, keys, [*blocks[:2], blocks[2][:, :4]], residues.lengths, "is no per_residue array"),
    ]:
        with pytest.raises(ValueError, match=said):
            cache.publish(names_, arrays, lengths, trunk=TRUNK, recipe=recipe, attestation=attestation)
    assert not cache.path.exists()


FULL = """
import resource
import sys
from entries import *
from proteus_pipeline.errors import StorageError
cache = EmbeddingCache(sys.argv[1])
made = make(int(sys.argv[2]), pooling=sys.argv[3], width=int(sys.argv[4]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]),) * 2)
try:
    publish(cache, made)
except StorageError as error:
    print(error)
print(serves(cache, made), serves(EmbeddingCache(sys.argv[1]), made))
"""


@pytest.mark.parametrize(
    ("number", "pooling", "width", "limit", "named"),
    [
        (30, "per_residue", 400, 0, "seg"),
        (30, "per_residue", 400, 4096, "seg"),
        (30, "per_residue", 400, 50_000, "seg"),
        (1, "mean", 8, 1500, "seg"),  # only the zip's directory does not fit
        (3000, "mean", 1, 160_000, "index"),  # the segment fits, and its index does not
    ],
)
def test_a_full_disk_is_one_error_and_leaves_nothing(
    tmp_path: Path, number: int, pooling: str, width: int, limit: int, named: str
):
    process = script(FULL, tmp_path, number, pooling, width, limit)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err == ""  # nor a traceback from a file that closed itself
    said, hits = out.splitlines()
    assert said.startswith(f"cannot write {tmp_path / named}")
    assert "file too large" in said
    assert hits == "0 0"
    assert names(tmp_path / "seg") + names(tmp_path / "index") == []
    made = make(number, pooling=pooling, width=width)
    publish(EmbeddingCache(tmp_path), made)
    assert serves(EmbeddingCache(tmp_path), made) == number


def test_a_read_only_cache_is_read_and_says_why_it_cant_be_written(read_only: Path, caplog: pytest.LogCaptureFixture):
    made, more = make(5), make(2, prefix="more")
    publish(EmbeddingCache(read_only), made)
    before = names(read_only / "seg") + names(read_only / "index") + names(read_only)
    close(read_only)
    cache = EmbeddingCache(read_only)
    assert serves(cache, made) == 5
    with pytest.raises(StorageError, match="permission denied; ask for permission there"):
        publish(cache, more)
    cache.record_use(5, 0, 0)  # nobody's run fails for this
    EmbeddingCache(read_only / "below").record_use(5, 0, 0)
    assert len(caplog.messages) == 2
    assert all("permission denied" in message for message in caplog.messages)
    assert serves(cache, made) == 5
    assert names(read_only / "seg") + names(read_only / "index") + names(read_only) == before


WRITER = """
import os, sys
from entries import *
cache = EmbeddingCache(sys.argv[1])
number = 0
while True:
    made = make(3, pooling=["mean", "per_residue"][number % 2], stored="fp16", width=64, prefix=f"{sys.argv[2]}-{number}-")
    publish(cache, made)
    os.write(1, f"{number}\\n".encode())
    number += 1
"""


@pytest.mark.torture
def test_a_killed_writer_loses_nothing_it_had_acknowledged(tmp_path: Path):
    rng = np.random.default_rng(3)
    acknowledged: list[tuple[int, int]] = []
    for life in range(KILLS):
        process = script(WRITER, tmp_path, life)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(float(rng.uniform(0, 0.03)))
        process.send_signal(signal.SIGKILL)
        rest, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, err
        acknowledged += [(life, int(line)) for line in (first + rest).splitlines(keepends=True) if line.endswith("\n")]
    assert len(acknowledged) >= KILLS
    cache = EmbeddingCache(tmp_path)
    for life, number in acknowledged:
        pooling = ["mean", "per_residue"][number % 2]
        made = make(3, pooling=pooling, stored="fp16", width=64, prefix=f"{life}-{number}-")
        assert serves(cache, made) == 3, (life, number)
    # And all that is visible is sound, acknowledged or not.
    visible = [key for index in cache.visible.indexes for key in key_strings(index.keys())]
    assert len(visible) >= 3 * len(acknowledged)
    assert not cache.visible.unreadable
    assert len(list(cache.find(visible))) == len(visible)


def test_a_view_is_the_stored_vector_mapped_and_read_only(tmp_path: Path):
    made = make(5, stored="bf16")
    cache = EmbeddingCache(tmp_path)
    publish(cache, made)
    for key, array in made.arrays.items():
        view = cache.view(key)
        assert view is not None
        assert (view.dtype, view.tobytes()) == (array.dtype, array.tobytes())
        assert not view.flags.writeable
    assert cache.view("0" * 32) is None
    damage(newest(tmp_path / "seg"))
    with pytest.raises(IntegrityError, match="is damaged"):
        cache.view(next(iter(made.arrays)))
    publish(cache, made)  # as a run does that finds it damaged
    for one in (cache, EmbeddingCache(tmp_path)):
        for merged in (False, True):
            if merged:
                one.visible.merge(everything=True)
            for key, array in made.arrays.items():
                view = one.view(key)
                assert view is not None and view.tobytes() == array.tobytes()
                assert one.get(key) is not None
    residues = make(1, pooling="per_residue", prefix="r")
    publish(cache, residues)
    with pytest.raises(ConfigError, match="is compressed"):
        cache.view(next(iter(residues.arrays)))


def test_what_was_read_stays_when_the_next_is_read_into_the_same_memory(tmp_path: Path):
    made = make(30, pooling="per_residue", width=700)  # above and below what is compressed in blocks made here
    cache = EmbeddingCache(tmp_path)
    publish(cache, made)

    def read(keys: list[str]) -> list[tuple[str, bytes]]:
        kept = [cache.find_one(key) for key in keys]
        return [(one[0].key, one[1].tobytes()) for one in kept if one]

    keys = list(made.arrays)
    expected = {key: array.tobytes() for key, array in made.arrays.items()}
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(read, [keys[i:] + keys[:i] for i in range(0, 30, 5)]))
    assert all(dict(one) == expected for one in [read(keys), *several])


def test_reading_leaves_bloscs_own_setting_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """zarr switches blosc's threads off for its process when it is imported."""
    from numcodecs import blosc

    made = make(3, pooling="per_residue", width=700)
    publish(EmbeddingCache(tmp_path), made)
    for setting in (False, None, True):
        monkeypatch.setattr(blosc, "use_threads", setting)
        assert all(EmbeddingCache(tmp_path).find_one(key) for key in made.arrays)
        assert blosc.use_threads is setting
