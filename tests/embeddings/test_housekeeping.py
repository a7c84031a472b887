from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from entries import HERE, THERE, TRUNK, Made, headers, make, publish, serves

from proteus_pipeline.embeddings import housekeeping
from proteus_pipeline.embeddings.cache import POLICIES, EmbeddingCache
from proteus_pipeline.embeddings.events import make_event, write_event
from proteus_pipeline.embeddings.housekeeping import compact, rewrite
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.errors import ConfigError, StorageError


def segments(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "seg").iterdir()) if (folder / "seg").exists() else []


def filled(folder: Path, number: int = 5) -> list[Made]:
    made = [make(20, prefix=f"{n}-", width=64) for n in range(number)]
    for one in made:
        publish(EmbeddingCache(folder), one)
    return made


def room_for(folder: Path, number: int) -> int:
    """Bytes in which so many of the segments fit, with all the indexes."""
    cache = EmbeddingCache(folder)
    each = headers(folder)[0].segment_bytes
    return number * each + cache.stats()["bytes"] - sum(h.segment_bytes for h in headers(folder)) + each // 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_is_kept_and_what_stays_is_whole(tmp_path: Path, policy: str):
    made = filled(tmp_path)
    cache = EmbeddingCache(tmp_path, max_bytes=room_for(tmp_path, 2), policy=policy)
    cleaning = cache.fit()
    assert len(cleaning.retired) == 3
    assert cache.stats()["bytes"] <= room_for(tmp_path, 2)
    assert len(segments(tmp_path)) == 2
    assert sorted(serves(EmbeddingCache(tmp_path), one) for one in made) == [0, 0, 0, 20, 20]
    assert cache.fit().retired == {}


def test_lru_keeps_what_was_read_last(tmp_path: Path):
    made = filled(tmp_path)
    cache = EmbeddingCache(tmp_path, max_bytes=room_for(tmp_path, 2))
    entries = [entry for entry, _ in cache.find(made[0].arrays)]
    time.sleep(1.1)  # uses are noted by the second
    cache.record_use(20, 0, 0, entries)
    cache.fit()
    assert [serves(cache, one) for one in made] == [20, 0, 0, 0, 20]


def test_cost_keeps_what_took_longest_for_its_bytes(tmp_path: Path):
    made = [make(20, prefix=f"{n}-", width=64) for n in range(4)]
    for one, seconds in zip(made, (1.0, 50.0, 2.0, 3.0), strict=True):
        publish(EmbeddingCache(tmp_path), one, seconds=seconds)
    EmbeddingCache(tmp_path, max_bytes=room_for(tmp_path, 1), policy="cost").fit()
    assert [serves(EmbeddingCache(tmp_path), one) for one in made] == [0, 20, 0, 0]


def test_what_a_run_holds_is_not_evicted(tmp_path: Path):
    made = filled(tmp_path)
    cache = EmbeddingCache(tmp_path, max_bytes=1)
    with cache.hold() as lease:
        lease.add(e.segment for e, _ in cache.find(made[1].arrays))
        publish(cache, made_now := make(5, prefix="now", width=64))
        cleaning = cache.fit()
        assert [serves(cache, one) for one in made] == [0, 20, 0, 0, 0]
        assert serves(cache, made_now) == 5
        assert len(cleaning.kept) == 2
    cache.fit()
    assert segments(tmp_path) == []


def test_a_reader_that_was_open_before_reads_what_is_evicted_as_a_miss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    made = filled(tmp_path, 1)[0]
    reader = EmbeddingCache(tmp_path)
    assert serves(reader, made) == 20
    EmbeddingCache(tmp_path, max_bytes=1).fit()
    assert serves(reader, made) == 0
    assert all(reader.get(key) is None for key in made.arrays)
    assert caplog.text == ""


@pytest.mark.parametrize(("limit", "policy", "said"), [(0, "lru", "max_bytes is 0"), (5, "best", "policy is 'best'")])
def test_a_budget_that_means_nothing_is_refused(tmp_path: Path, limit: int, policy: str, said: str):
    with pytest.raises(ConfigError, match=said):
        EmbeddingCache(tmp_path, max_bytes=limit, policy=policy)


def test_weights_that_nobody_has_are_collected_after_the_grace_period(tmp_path: Path):
    made = filled(tmp_path)
    cache = EmbeddingCache(tmp_path)
    young = cache.gc(trunks=[], dry_run=True)
    assert (young.retired, len(young.kept)) == ({}, 5)
    assert cache.gc(trunks=[TRUNK], grace_seconds=0, dry_run=True).retired == {}
    assert cache.gc(trunks=None, grace_seconds=0, dry_run=True).retired == {}
    assert [serves(cache, one) for one in made] == [20] * 5
    planned = cache.gc(trunks=[], grace_seconds=0, dry_run=True)
    assert len(planned.retired) == 5
    assert planned.nbytes == sum(h.segment_bytes for h in headers(tmp_path))
    assert [serves(cache, one) for one in made] == [20] * 5
    done = cache.gc(trunks=[], grace_seconds=0)
    assert done.retired == planned.retired
    assert [serves(EmbeddingCache(tmp_path), one) for one in made] == [0] * 5
    assert segments(tmp_path) == []
    assert list((tmp_path / "events").iterdir()) == []  # nothing is left that they could be about
    assert EmbeddingCache(tmp_path).stats()["segments"] == 0


def test_what_is_invalidated_goes_and_what_came_after_stays(tmp_path: Path):
    made = filled(tmp_path, 1)[0]
    cache = EmbeddingCache(tmp_path)
    assert cache.invalidate(TRUNK, "a bug") == 20
    publish(cache, made)
    assert serves(cache, made) == 20
    before = segments(tmp_path)
    assert len(cache.gc(grace_seconds=0).retired) == 1
    assert len(segments(tmp_path)) == 1
    assert segments(tmp_path)[0] == before[1]
    assert serves(EmbeddingCache(tmp_path), made) == 20


def test_what_killed_writers_left_goes_when_it_is_old(tmp_path: Path):
    filled(tmp_path, 1)
    left = tmp_path / "seg" / ".tmp-0123.zip"
    left.write_bytes(b"half")
    cache = EmbeddingCache(tmp_path)
    assert cache.gc(grace_seconds=0).removed == ()  # a writer may be at it
    os.utime(left, (time.time() - 7200,) * 2)
    with cache.hold():
        assert cache.gc(grace_seconds=0).removed == ("seg/.tmp-0123.zip",)
    assert not left.exists()


def test_compaction_takes_whichever_copy_is_sound(tmp_path: Path):
    made = make(5, width=64)
    for _ in range(2):
        publish(EmbeddingCache(tmp_path), made)
    first, second = sorted((tmp_path / "seg").iterdir())
    for path, offset in ((first, 60), (second, 600)):
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)
    cache = EmbeddingCache(tmp_path)
    assert compact(cache, everything=True) == 2
    assert serves(cache, made) == 5


def test_an_error_that_may_be_over_soon_stops_compaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = filled(tmp_path, 4)
    cache = EmbeddingCache(tmp_path)

    def too_many(*_: object) -> None:
        raise StorageError("cannot read it: too many open files", "close some")

    monkeypatch.setattr(EmbeddingCache, "read", too_many)
    with pytest.raises(StorageError, match="too many open files"):
        compact(cache)
    monkeypatch.undo()
    assert [serves(EmbeddingCache(tmp_path), one) for one in made] == [20] * 4


def test_a_clock_that_is_ahead_hides_nothing_that_comes_later(tmp_path: Path):
    made = make(3)
    cache = EmbeddingCache(tmp_path)
    publish(cache, made)
    write_event(cache.store, make_event("invalidated", "why", after=time.time_ns() + 10**13, trunk=TRUNK))
    assert serves(cache, made) == 0
    publish(cache, made)
    assert serves(cache, made) == 3
    assert cache.invalidate(TRUNK, "again") == 3  # though its segment is of the future
    assert serves(cache, made) == 0


def test_the_budget_counts_what_was_written_again(tmp_path: Path):
    made = filled(tmp_path, 4)
    assert compact(EmbeddingCache(tmp_path)) == 4
    assert len(segments(tmp_path)) == 5
    cache = EmbeddingCache(tmp_path, max_bytes=EmbeddingCache(tmp_path).stats()["bytes"] + 1000)
    cache.fit()
    assert len(segments(tmp_path)) == 1
    assert [serves(cache, one) for one in made] == [20] * 4


def test_small_segments_of_one_kind_are_written_together(tmp_path: Path):
    made = [make(3, prefix=f"{n}-", pooling="per_residue", stored="fp16", width=64) for n in range(6)]
    for n, one in enumerate(made):
        publish(EmbeddingCache(tmp_path), one, THERE if n == 5 else HERE, seconds=2.0, tokens=200)
    cache = EmbeddingCache(tmp_path)
    reader = EmbeddingCache(tmp_path)
    assert [serves(reader, one) for one in made] == [3] * 6
    before = {k: [e.seconds for e in v] for k, v in cache.candidates(list(made[0].arrays)).items()}
    assert compact(cache) == 5
    assert len(headers(tmp_path)) == 2
    assert cache.stats()["entries"] == 18
    assert [serves(reader, one) for one in made] == [serves(cache, one) for one in made] == [3] * 6
    after = {k: [e.seconds for e in v] for k, v in cache.candidates(list(made[0].arrays)).items()}
    assert set(before) == set(after)
    assert {h.attestation.device_class for h in headers(tmp_path)} == {HERE, THERE}
    assert compact(cache) == 0
    cache.gc(grace_seconds=0)  # the old files stay until then: a reader may be about to read them
    assert len(segments(tmp_path)) == 2
    assert [serves(EmbeddingCache(tmp_path), one) for one in made] == [3] * 6


def test_start_tokens_survive_being_written_again(tmp_path: Path):
    made = make(4, pooling="per_residue", width=16)
    cache = EmbeddingCache(tmp_path)
    publication = cache.begin(TRUNK, made.recipe)
    for (key, array), length in zip(made.arrays.items(), made.lengths, strict=True):
        publication.add(key, array, length, array[-1])
    publication.publish(Attestation(HERE, "2.0.0", "2026-01-01T00:00:00+00:00", 1.0, 10))
    (header,) = headers(tmp_path)
    cache.refresh()
    rewrite(cache, [header])
    for key, entries in cache.candidates(list(made.arrays)).items():
        start = cache.read_start(entries[0])
        assert start is not None
        assert start.tobytes() == made.arrays[key][-1].tobytes()


def test_a_segment_of_which_half_is_quarantined_is_written_again(tmp_path: Path):
    made = filled(tmp_path, 1)[0]
    (header,) = headers(tmp_path)
    cache = EmbeddingCache(tmp_path)
    keys = list(made.arrays)
    write_event(cache.store, make_event("quarantined", "a test", segments={header.segment: keys[:9]}))
    assert compact(cache) == 0
    write_event(cache.store, make_event("quarantined", "a test", segments={header.segment: keys[9:10]}))
    assert compact(cache) == 1
    assert serves(cache, made) == 10
    assert headers(tmp_path)[0].entries == 10


def test_a_kill_between_the_new_segment_and_the_old_ones_end_leaves_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = filled(tmp_path, 4)
    monkeypatch.setattr(housekeeping, "write_event", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compact(EmbeddingCache(tmp_path))
    monkeypatch.undo()
    assert [serves(EmbeddingCache(tmp_path), one) for one in made] == [20] * 4
    assert compact(EmbeddingCache(tmp_path)) == 5
    assert [serves(EmbeddingCache(tmp_path), one) for one in made] == [20] * 4
    assert EmbeddingCache(tmp_path).stats()["entries"] == 80
