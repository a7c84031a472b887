from __future__ import annotations

import os
from pathlib import Path

import pytest
from entries import make, publish

from proteus_pipeline.embeddings.activity import CacheMeter
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.usage import LookUps, record_use, uses
from proteus_pipeline.errors import IntegrityError, StorageError


def test_the_numbers_are_those_of_the_folder(tmp_path: Path):
    cache = EmbeddingCache(tmp_path, max_bytes=10_000_000)
    meter = CacheMeter(EmbeddingCache(tmp_path, max_bytes=10_000_000))
    empty = meter.measure()
    assert (empty.entries, empty.segment_bytes, empty.index_bytes, empty.runs) == (0, 0, 0, 0)
    for number in range(3):
        publish(cache, make(4, prefix=f"{number}-"))
    cache.record_use(3, 2, 1)
    with cache.hold():
        found = meter.measure()
    assert (found.entries, found.segments, found.limit_bytes, found.runs) == (12, 3, 10_000_000, 1)
    assert (found.hits, found.derived, found.misses) == (3, 2, 1)
    assert found.segment_bytes == sum(p.stat().st_size for p in (tmp_path / "seg").iterdir())
    assert found.index_bytes == sum(p.stat().st_size for f in ("index", "runs") for p in (tmp_path / f).glob("*"))
    assert (meter.measure().runs, found.hidden_bytes, found.evictions) == (0, 0, 0)


def test_evictions_and_invalidations_are_counted_and_never_fall(tmp_path: Path):
    cache = EmbeddingCache(tmp_path, max_bytes=3000)
    meter = CacheMeter(cache)
    for number in range(6):
        publish(cache, make(4, prefix=f"{number}-"))
    cleaning = cache.fit()
    assert 0 < meter.measure().evictions == len(cleaning.retired)
    publish(cache, make(4, prefix="later"))
    (trunk,) = {h.trunk for h in cache.all_segments()}
    assert cache.invalidate(trunk, "a test") > 0
    found = meter.measure()
    assert (found.entries, found.segments, found.segment_bytes, found.invalidations) == (0, 0, 0, 1)
    assert found.hidden_bytes == sum(p.stat().st_size for p in (tmp_path / "seg").iterdir()) > 0
    cache.gc(grace_seconds=0)
    after = meter.measure()
    assert (after.hidden_bytes, after.evictions, after.invalidations) == (0, len(cleaning.retired), 1)


def test_a_damaged_event_is_said(tmp_path: Path):
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "1-x.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"1-x.json is damaged"):
        CacheMeter(EmbeddingCache(tmp_path)).measure()


def sums(look_ups: LookUps) -> tuple[int, int, int]:
    look_ups.read()
    return look_ups.hits, look_ups.derived, look_ups.misses


def test_look_ups_are_read_on_from_where_the_last_reading_ended(tmp_path: Path):
    look_ups = LookUps(tmp_path)
    assert sums(look_ups) == (0, 0, 0)
    for number in range(1, 4):
        record_use(tmp_path, number, 0, 1, {})
        assert sums(look_ups) == (sum(range(number + 1)), 0, number)
    file = tmp_path / "uses.jsonl"
    whole = file.read_bytes()
    with file.open("ab") as appending:
        appending.write(b'\n{"time": "2026-01-01T00:00:00+00:00", "hits": 7')  # it is being written
    assert sums(look_ups) == (6, 0, 3)
    record_use(tmp_path, 10, 0, 0, {})
    assert sums(look_ups) == (16, 0, 3), "what was cut short is no look-up, and takes no other along"
    assert sums(LookUps(tmp_path)) == (16, 0, 3)
    assert sum(use.hits for use in uses(tmp_path)) == 16
    os.truncate(file, len(whole) // 2)
    again = sums(look_ups)
    assert again == sums(LookUps(tmp_path)) and again[0] < 6
    file.unlink()
    assert sums(look_ups) == (0, 0, 0)


def test_look_ups_that_can_not_be_read_are_an_error(tmp_path: Path):
    (tmp_path / "uses.jsonl").mkdir()
    with pytest.raises(StorageError, match="cannot read"):
        LookUps(tmp_path).read()
