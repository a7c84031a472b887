from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from entries import HERE, TRUNK, Made, make, publish, serves

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import Attestation, Index
from proteus_pipeline.embeddings.publication import Publication
from proteus_pipeline.embeddings.segment import SegmentWriter, describe
from proteus_pipeline.embeddings.stored import content_hash
from proteus_pipeline.errors import StorageError
from proteus_pipeline.stores import files
from proteus_pipeline.stores.store import LocalStore

ATTESTED = Attestation(HERE, "2.0.0", "2026-01-01T00:00:00+00:00", 3.0, 100)


def every(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def filled(cache: EmbeddingCache, made: Made) -> Publication:
    publication = cache.begin(TRUNK, made.recipe)
    for (key, array), length in zip(made.arrays.items(), made.lengths, strict=True):
        assert publication.add(key, array, length) == content_hash(array, made.recipe.stored)
    return publication


@pytest.mark.parametrize("pooling", ["mean", "per_residue"])
def test_nobody_sees_an_entry_before_all_are_published(tmp_path: Path, pooling: str):
    made = make(40, pooling=pooling)
    publication = filled(EmbeddingCache(tmp_path), made)
    assert len(publication) == 40
    assert serves(EmbeddingCache(tmp_path), made) == 0
    assert EmbeddingCache(tmp_path).stats()["entries"] == 0
    publication.publish(ATTESTED)
    assert serves(EmbeddingCache(tmp_path), made) == 40
    publication.discard()  # does nothing by now
    assert serves(EmbeddingCache(tmp_path), made) == 40


@pytest.mark.parametrize("pooling", ["mean", "per_residue"])
def test_what_is_discarded_leaves_nothing(tmp_path: Path, pooling: str):
    publish(EmbeddingCache(tmp_path), make(2, prefix="kept"))
    before = every(tmp_path)
    for made in (make(0), make(1, pooling=pooling), make(70, pooling=pooling)):
        publication = filled(EmbeddingCache(tmp_path), made)
        publication.discard()
        publication.discard()
        assert every(tmp_path) == before


def test_no_entries_are_no_segment(tmp_path: Path):
    publication = EmbeddingCache(tmp_path).begin(TRUNK, make(1).recipe)
    with pytest.raises(ValueError, match="no entries make no segment"):
        publication.publish(ATTESTED)
    publication.discard()
    assert every(tmp_path) == {}


def test_a_key_that_is_there_already_is_passed_over(tmp_path: Path):
    made = make(3)
    publication = filled(EmbeddingCache(tmp_path), made)
    key, array = next(iter(made.arrays.items()))
    assert publication.add(key, array + 1, made.lengths[0]) == content_hash(array + 1, "fp32")
    assert len(publication) == 3
    publication.publish(ATTESTED)
    assert serves(EmbeddingCache(tmp_path), made) == 3


@pytest.mark.parametrize(("pooling", "stored"), [("mean", "bf16"), ("per_residue", "fp16")])
def test_what_the_header_says_is_what_lies_there(tmp_path: Path, pooling: str, stored: str):
    made = make(70, pooling=pooling, stored=stored)
    before = time.time_ns()
    header = filled(EmbeddingCache(tmp_path), made).publish(ATTESTED, note="more")
    segment = tmp_path / "seg" / header.segment
    data = segment.read_bytes()
    assert re.fullmatch(r"\d{20}-[0-9a-f]{12}\.zip", segment.name)
    assert before <= header.published <= time.time_ns()
    assert (header.segment_bytes, header.digest) == (len(data), xxhash.xxh3_128_hexdigest(data))
    assert (header.entries, header.width, header.stored, header.trunk) == (70, 8, stored, TRUNK)
    assert (header.recipe, header.attestation) == (made.recipe.described(), ATTESTED)
    (index,) = (tmp_path / "index").iterdir()
    assert index.stem == segment.stem
    assert Index.read(LocalStore(tmp_path), f"index/{index.name}").segments == (header,)
    # The segment says all of it itself, should its index be lost.
    said = describe(segment)
    assert said.attributes["proteus"]["note"] == "more"
    assert (said.keys, said.lengths) == (list(made.arrays), made.lengths)
    assert (said.layout, said.width, tuple(said.chunk_starts) if pooling == "per_residue" else ()) == (
        header.layout, header.width, header.chunk_starts
    )  # fmt: skip


def test_start_tokens_come_back_where_they_are_known(tmp_path: Path):
    made = make(70, pooling="per_residue", stored="bf16")
    cache = EmbeddingCache(tmp_path)
    publication = cache.begin(TRUNK, made.recipe)
    starts = {}
    for number, ((key, array), length) in enumerate(zip(made.arrays.items(), made.lengths, strict=True)):
        starts[key] = None if number % 3 == 0 else np.full(8, number + 1, dtype="<u2")
        publication.add(key, array, length, starts[key])
    publication.publish(ATTESTED)
    for entry, _ in cache.find(starts):
        got, expected = cache.read_start(entry), starts[entry.key]
        assert (got is None) == (expected is None)
        assert expected is None or got.tobytes() == expected.tobytes()


def test_what_was_added_is_on_the_disk_and_not_in_memory(tmp_path: Path):
    cache = EmbeddingCache(tmp_path)
    made = make(1, pooling="per_residue")
    publication = cache.begin(TRUNK, made.recipe)
    rng = np.random.default_rng(0)
    written = []
    for number in range(20):
        publication.add(f"{number:032x}", rng.standard_normal((100, 640)).astype("<f4"), 100)
        written.append(sum(len(data) for data in every(tmp_path).values()))
    assert written[19] > 14 * 200_000  # all but the few that are being compressed
    assert written[9] > 4 * 200_000
    publication.discard()


def test_two_segments_in_the_making_do_not_meet(tmp_path: Path):
    cache = EmbeddingCache(tmp_path)
    one, two = make(5, prefix="one"), make(5, prefix="two", pooling="per_residue")
    first, second = filled(cache, one), filled(cache, two)
    assert first.name != second.name
    second.publish(ATTESTED)
    assert [serves(cache, made) for made in (one, two)] == [0, 5]
    first.publish(ATTESTED)
    assert [serves(cache, made) for made in (one, two)] == [5, 5]


def test_arrays_of_another_width_or_shape_are_refused(tmp_path: Path):
    publication = EmbeddingCache(tmp_path).begin(TRUNK, make(1).recipe)
    publication.add("0" * 32, np.zeros(8, "<f4"), 5)
    for array in (np.zeros(9, "<f4"), np.zeros((5, 8), "<f4"), np.zeros(8, "<f2"), np.zeros(8, ">f4")):
        with pytest.raises(ValueError, match="is no mean array of 5 residues in fp32"):
            publication.add("1" * 32, array, 5)
    assert len(publication) == 1
    publication.discard()


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fails_at(number: int) -> Callable[[Path], None]:
    calls: list[Path] = []

    def fsync(path: Path) -> None:
        calls.append(path)
        if len(calls) == number:
            no_space()

    return fsync


@pytest.mark.parametrize("step", ["begin", "add", "finish", "segment", "its folder", "index", "the index's folder"])
def test_a_failure_at_any_step_leaves_the_cache_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    kept, made = make(3, prefix="kept"), make(40)
    publish(EmbeddingCache(tmp_path), kept)
    before = every(tmp_path)
    flushes = {"segment": 1, "its folder": 2, "index": 3, "the index's folder": 4}
    if step in flushes:
        monkeypatch.setattr(files, "_fsync", fails_at(flushes[step]))
    else:
        monkeypatch.setattr(SegmentWriter, "__init__" if step == "begin" else step, no_space)
    with pytest.raises(StorageError, match=r"^cannot write .*: no space left on device; free space there"):
        filled(EmbeddingCache(tmp_path), made).publish(ATTESTED)
    assert every(tmp_path) == before
    monkeypatch.undo()
    assert [serves(EmbeddingCache(tmp_path), m) for m in (kept, made)] == [3, 0]
    filled(EmbeddingCache(tmp_path), made).publish(ATTESTED)
    assert [serves(EmbeddingCache(tmp_path), m) for m in (kept, made)] == [3, 40]


def test_an_end_between_segment_and_index_is_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As kill -9 would: the segment stays, and nobody sees it."""
    made = make(5)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalStore, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        filled(EmbeddingCache(tmp_path), made).publish(ATTESTED)
    monkeypatch.undo()
    assert len(list((tmp_path / "seg").iterdir())) == 1
    assert serves(EmbeddingCache(tmp_path), made) == 0
    filled(EmbeddingCache(tmp_path), made).publish(ATTESTED)
    assert serves(EmbeddingCache(tmp_path), made) == 5


def test_a_publication_that_failed_stays_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever keeps what is finished after an error asks it again."""
    made = make(3, pooling="per_residue")
    publication = EmbeddingCache(tmp_path).begin(TRUNK, made.recipe)
    monkeypatch.setattr(SegmentWriter, "add", no_space)
    for _ in range(2):
        with pytest.raises(StorageError, match="no space left"):
            publication.add(*next(iter(made.arrays.items())), made.lengths[0])
    with pytest.raises(StorageError, match="no space left"):
        publication.publish(ATTESTED)
    assert every(tmp_path) == {}
