from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
from entries import TRUNK, headers, make, publish, serves

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.housekeeping import compact
from proteus_pipeline.embeddings.index import encode_index
from proteus_pipeline.errors import IntegrityError, StorageError


def test_push_and_pull_bring_what_is_missing_and_no_more(tmp_path: Path):
    here, there = EmbeddingCache(tmp_path / "here"), EmbeddingCache(tmp_path / "there")
    made = [make(6, prefix=f"{n}{p}", pooling=p, stored="fp16") for n in range(5) for p in ("mean", "per_residue")]
    for one in made:
        publish(here, one)  # some are merged into a run, some are not
    assert there.pull(tmp_path / "here", dry_run=True).entries == 60
    assert not (tmp_path / "there").exists()
    copied = here.push(tmp_path / "there")
    assert (copied.segments, copied.entries, copied.there) == (10, 60, 0)
    assert copied.nbytes == sum(h.segment_bytes for h in headers(tmp_path / "here"))
    assert [serves(there, one) for one in made] == [6] * 10
    assert there.verify().findings == ()
    again = here.push(tmp_path / "there")
    assert (again.segments, again.there) == (0, 10)
    more = make(2, prefix="more")
    publish(there, more)
    assert here.pull(tmp_path / "there").entries == 2
    assert serves(here, more) == 2
    assert there.stats()["entries"] == here.stats()["entries"] == 62


def test_only_one_models_embeddings_go_where_one_is_named(tmp_path: Path):
    here = EmbeddingCache(tmp_path / "here")
    made = make(3)
    publish(here, made)
    assert here.push(tmp_path / "there", trunk="f" * 32).segments == 0
    assert here.push(tmp_path / "there", trunk=TRUNK).segments == 1


def test_a_damaged_segment_is_refused_and_nothing_of_it_arrives(tmp_path: Path):
    here = EmbeddingCache(tmp_path / "here")
    publish(here, make(3))
    (path,) = (tmp_path / "here" / "seg").iterdir()
    path.write_bytes(path.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(IntegrityError, match="is not the file that was written"):
        here.push(tmp_path / "there")
    assert [p for p in (tmp_path / "there").rglob("*") if p.is_file()] == []
    path.unlink()
    with pytest.raises(StorageError, match="is gone; run: proteus cache verify"):
        EmbeddingCache(tmp_path / "here").push(tmp_path / "there")


def test_what_was_hidden_stays_hidden_on_the_other_side(tmp_path: Path):
    here, there = EmbeddingCache(tmp_path / "here"), EmbeddingCache(tmp_path / "there")
    made = make(4)
    publish(here, made)
    here.push(tmp_path / "there")
    here.invalidate(TRUNK, "a bug")
    assert here.push(tmp_path / "there").events == 1
    assert serves(there, made) == 0
    publish(here, made)
    here.push(tmp_path / "there")
    assert serves(there, made) == 4


def test_a_shared_cache_is_read_beneath_the_own_and_never_written(tmp_path: Path):
    shared = EmbeddingCache(tmp_path / "shared")
    ours, theirs = make(4, prefix="ours"), make(4, prefix="theirs", pooling="per_residue")
    publish(shared, theirs)
    publish(shared, ours)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "shared").rglob("*"))
    mine = EmbeddingCache(tmp_path / "mine", shared=tmp_path / "shared")
    assert serves(mine, theirs) == serves(mine, ours) == 4
    assert all(mine.get(key) is not None for key in [*ours.arrays, *theirs.arrays])
    assert mine.vectors(list(ours.arrays)).shape == (4, 8)
    own = make(3, prefix="own")
    publish(mine, own)
    assert serves(mine, own) == 3
    assert serves(shared, own) == 0
    assert mine.stats()["entries"] == 3
    # What the own cache hides is hidden beneath it, for whoever reads through it.
    assert mine.invalidate(TRUNK, "a bug", pooling="mean") == 7
    assert (serves(mine, ours), serves(mine, theirs), serves(mine, own)) == (0, 4, 0)
    assert serves(shared, ours) == 4
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "shared").rglob("*")) == before


def test_what_is_damaged_or_evicted_here_is_read_beneath(tmp_path: Path):
    made = make(4, pooling="per_residue")
    publish(EmbeddingCache(tmp_path / "shared"), made)
    mine = EmbeddingCache(tmp_path / "mine", shared=tmp_path / "shared")
    mine.pull(tmp_path / "shared")
    (path,) = (tmp_path / "mine" / "seg").iterdir()
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    assert serves(EmbeddingCache(tmp_path / "mine", shared=tmp_path / "shared"), made) == 4
    mine.verify(repair=True)
    assert serves(EmbeddingCache(tmp_path / "mine"), made) == 0
    assert serves(mine, made) == 4
    mine.pull(tmp_path / "shared")
    EmbeddingCache(tmp_path / "mine", max_bytes=1).fit()
    assert serves(mine, made) == 4
    assert serves(EmbeddingCache(tmp_path / "mine"), made) == 0


def test_what_was_evicted_quarantined_or_lost_can_be_pulled_again(tmp_path: Path):
    made = make(4)
    archive = EmbeddingCache(tmp_path / "archive")
    publish(archive, made)
    mine = EmbeddingCache(tmp_path / "mine")
    assert mine.pull(tmp_path / "archive").entries == 4
    EmbeddingCache(tmp_path / "mine", max_bytes=1).fit()
    assert serves(mine, made) == 0
    assert mine.push(tmp_path / "archive").events == 0  # what was evicted here is there for that
    assert serves(EmbeddingCache(tmp_path / "archive"), made) == 4
    assert mine.pull(tmp_path / "archive").entries == 4
    assert serves(mine, made) == 4
    (path,) = (tmp_path / "mine" / "seg").iterdir()
    path.write_bytes(bytes(path.stat().st_size))
    mine.verify(repair=True)
    assert serves(EmbeddingCache(tmp_path / "mine"), made) == 0
    assert mine.pull(tmp_path / "archive").entries == 4
    assert serves(EmbeddingCache(tmp_path / "mine"), made) == 4
    assert mine.pull(tmp_path / "archive").there == 1
    compact(mine, everything=True)
    assert mine.pull(tmp_path / "archive").there == 1  # the same numbers, in a segment of its own


def test_what_was_invalidated_does_not_come_back_by_way_of_a_copy_that_was_written_again(tmp_path: Path):
    made = make(4)
    one, two = EmbeddingCache(tmp_path / "one"), EmbeddingCache(tmp_path / "two")
    publish(one, made)
    two.pull(tmp_path / "one")
    one.invalidate(TRUNK, "a bug")
    assert compact(two, everything=True) == 1
    one.pull(tmp_path / "two")
    assert serves(one, made) == 0
    one.push(tmp_path / "two")
    assert serves(two, made) == 0


def test_what_the_target_has_invalidated_is_not_copied_again_and_again(tmp_path: Path):
    made, newer = make(4), make(2, prefix="newer")
    archive, mine = EmbeddingCache(tmp_path / "archive"), EmbeddingCache(tmp_path / "mine")
    publish(archive, made)
    mine.pull(tmp_path / "archive")
    mine.invalidate(TRUNK, "a bug")
    publish(archive, newer)
    assert mine.pull(tmp_path / "archive", dry_run=True).entries == 2
    assert [mine.pull(tmp_path / "archive").entries for _ in range(3)] == [2, 0, 0]
    assert (serves(mine, made), serves(mine, newer)) == (0, 2)
    assert len(list((tmp_path / "mine" / "seg").iterdir())) == 2


def test_a_forged_size_does_not_hold_a_copy(tmp_path: Path):
    hostile = EmbeddingCache(tmp_path / "hostile")
    publish(hostile, make(3))
    ((index, rows),) = (hostile.refresh(), hostile.visible.by_segment().values())[1]
    forged = dataclasses.replace(index.segments[0], segment_bytes=1 << 60)
    (path,) = (tmp_path / "hostile" / "index").iterdir()
    path.write_bytes(encode_index([forged], index.keys(rows), index.records[rows]))
    failed: list[str] = []

    def pull() -> None:
        try:
            EmbeddingCache(tmp_path / "mine").pull(tmp_path / "hostile")
        except IntegrityError as error:
            failed.append(str(error))

    pulling = threading.Thread(target=pull, daemon=True)
    pulling.start()
    pulling.join(20)
    assert failed and "is not the file that was written" in failed[0]


@pytest.mark.parametrize(
    "name", ["00000000000000000001-/../../../victim.zip", "../x.zip", "1-a/b.zip", "9" * 30 + "-a.zip"]
)
def test_a_forged_name_reaches_no_file_outside(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture):
    made = make(3)
    hostile = EmbeddingCache(tmp_path / "hostile")
    publish(hostile, made)
    ((index, rows),) = (hostile.refresh(), hostile.visible.by_segment().values())[1]
    forged = dataclasses.replace(index.segments[0], segment=name)
    data = encode_index([forged], index.keys(rows), index.records[rows])
    hostile.store.write("index/00000000000000000009-abc.idx", data)
    (tmp_path / "victim.zip").write_text("precious")
    mine = EmbeddingCache(tmp_path / "mine")
    mine.pull(tmp_path / "hostile")
    EmbeddingCache(tmp_path / "hostile").gc(trunks=[], grace_seconds=0)
    assert (tmp_path / "victim.zip").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} <= {"hostile", "mine", "victim.zip"}
    assert "says what no index of format 1 says" in caplog.text


def test_what_repair_has_quarantined_does_not_stop_a_push(tmp_path: Path):
    made = make(4)
    here = EmbeddingCache(tmp_path / "here")
    publish(here, made)
    key = list(made.arrays)[2]
    ((entry,),) = here.candidates([key]).values()
    path = tmp_path / "here" / "seg" / entry.segment
    data = bytearray(path.read_bytes())
    data[entry.offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="run: proteus cache verify --repair"):
        here.push(tmp_path / "there")
    here.verify(repair=True)
    assert here.push(tmp_path / "there").entries == 3
    assert serves(EmbeddingCache(tmp_path / "there"), made) == serves(here, made) == 3
